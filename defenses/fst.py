"""FST: feature shift tuning, away from the suspect's classifier (Min et al., NeurIPS 2023)."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn import functional as F

from dhbe.contracts.defense import Defense
from dhbe.core.types import Batch
from dhbe.data import Budget, DefenderData, even
from dhbe.models import Normalized
from dhbe.models.dataflow import classifier
from dhbe.training.runtime import Runtime
from dhbe.training.schedule import Schedule


class FST(Defense):
    """Train CE + alpha <W, W_suspect> with a new classifier W of the suspect's norm.

    arXiv 2310.01875. W starts anew, uniform in +-1 / sqrt(d), and is brought back to
    ||W_suspect||_F after every step.

    Args:
        alpha: weight of the inner product: 0.1 (the code's own default is 0.2); for a hundred
            classes and more close to 0.
    """

    needs: ClassVar[Budget] = Budget(fraction=1e-9)

    def __init__(self, *, alpha: Annotated[float, Ge(0)], schedule: Schedule) -> None:
        self.alpha, self.schedule = alpha, schedule

    def repair(self, network: Normalized, data: DefenderData, runtime: Runtime) -> Normalized:
        clean, head = data.clean(), classifier(network)
        before = head.weight.detach().clone()
        restart(head, runtime.rng("fst"))

        def loss(net: nn.Module, batch: Batch) -> Tensor:
            total = F.cross_entropy(net(batch.images), batch.labels)
            return total + self.alpha * (head.weight * before).sum()

        @torch.no_grad()
        def rescale() -> None:
            head.weight.mul_(before.norm() / head.weight.norm())

        runtime.train(
            network,
            clean,
            self.schedule,
            purpose="fst",
            batch_size=even(len(clean), self.schedule.batch_size),
            loss=loss,
            after_step=rescale,
        )
        return network


@torch.no_grad()
def restart(head: nn.Linear, rng: torch.Generator) -> None:
    """All weights and biases uniform in +-1 / sqrt(inputs)."""
    bound = 1 / math.sqrt(head.in_features)
    for value in head.parameters():
        drawn = torch.rand(value.shape, generator=rng)
        value.copy_(bound * (2 * drawn - 1))
