"""ULRL: unlearn, find suspicious outputs, relearn (Min et al., arXiv 2405.14781)."""

from __future__ import annotations

import copy
import math
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from torch.nn import functional as F

from dhbe.contracts.defense import Defense
from dhbe.core.types import Batch
from dhbe.data import Budget, DefenderData, even
from dhbe.methods.statistics import outliers
from dhbe.methods.unlearning import unlearn
from dhbe.models import Normalized
from dhbe.models.dataflow import classifier
from dhbe.training.runtime import Runtime
from dhbe.training.schedule import Schedule


class ULRL(Defense):
    """Reset the classifier rows that clean unlearning moves most, then relearn away from them.

    1. Ascend the clean cross-entropy until accuracy falls to ``stop_accuracy``.
    2. Delta_k = sum_j |W_kj after - W_kj before|; rows above the median whose deviation exceeds
       ``outlier`` x 1.4826 MAD are suspicious, at most ``most`` of them, the largest first.
    3. In the original network they restart at U(-s, s), s = sqrt(2 / d), bias 0.
    4. All weights learn CE + alpha sum_k cos(W_k, W_k before).

    The found rows are reported: they should be the target class. Without any, step 4 is plain
    fine-tuning, as in the official code; a note says so.

    Args:
        alpha: 0.7 for CIFAR-10, 0.001 for more classes.
        relearn_schedule: rate 0.005 for CIFAR-10, 0.001 for more classes.
    """

    needs: ClassVar[Budget] = Budget(fraction=1e-9)

    def __init__(
        self,
        *,
        stop_accuracy: Annotated[float, Ge(0), Le(1)],
        clip: Annotated[float, Gt(0)],
        outlier: Annotated[float, Gt(0)],
        most: Annotated[int, Ge(1)],
        alpha: Annotated[float, Ge(0)],
        unlearn_schedule: Schedule,
        relearn_schedule: Schedule,
    ) -> None:
        self.stop_accuracy, self.clip, self.outlier = stop_accuracy, clip, outlier
        self.most, self.alpha = most, alpha
        self.unlearn_schedule, self.relearn_schedule = unlearn_schedule, relearn_schedule

    def repair(self, network: Normalized, data: DefenderData, runtime: Runtime) -> Normalized:
        clean = data.clean()
        suspicious = self.suspicious(network, data, runtime)
        runtime.recorder.suspect(suspicious, "ulrl")
        if not suspicious:
            runtime.recorder.notes.append("ulrl reset no row: what follows is plain fine-tuning")
        head = classifier(network)
        before = head.weight.detach().clone()
        reset(head, suspicious, runtime.rng("ulrl reset"))

        def loss(net: nn.Module, batch: Batch) -> Tensor:
            total = F.cross_entropy(net(batch.images), batch.labels)
            if suspicious:
                likeness = F.cosine_similarity(head.weight[suspicious], before[suspicious])
                total = total + self.alpha * likeness.sum()
            return total

        runtime.train(
            network,
            clean,
            self.relearn_schedule,
            purpose="ulrl",
            batch_size=even(len(clean), self.relearn_schedule.batch_size),
            loss=loss,
        )
        return network

    def suspicious(self, network: Normalized, data: DefenderData, runtime: Runtime) -> list[int]:
        """Classes whose row of the classifier moves far when the clean task is unlearned."""
        forgetful = copy.deepcopy(network)
        unlearn(
            forgetful,
            data.clean(),
            self.unlearn_schedule,
            runtime,
            stop_accuracy=self.stop_accuracy,
            clip=self.clip,
        )
        change = (classifier(forgetful).weight - classifier(network).weight).detach()
        moved = change.abs().sum(dim=1)
        flagged = outliers(moved.cpu().numpy(), self.outlier, side="above")
        return sorted(flagged, key=lambda k: -float(moved[k]))[: self.most]


@torch.no_grad()
def reset(head: nn.Linear, rows: list[int], rng: torch.Generator) -> None:
    """Fresh rows, uniform with He's deviation as bound, and bias 0."""
    bound = math.sqrt(2 / head.in_features)
    drawn = torch.rand((len(rows), head.in_features), generator=rng)
    head.weight[rows] = (bound * (2 * drawn - 1)).to(head.weight)
    if head.bias is not None:
        head.bias[rows] = 0
