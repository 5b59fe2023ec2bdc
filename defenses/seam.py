"""SEAM: selective amnesia by random labels (Zhu et al., IEEE S&P 2023, arXiv 2212.04687)."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor
from torch.nn import functional as F

from dhbe.contracts.defense import Defense
from dhbe.core.types import Batch
from dhbe.data import Budget, DefenderData
from dhbe.methods.unlearning import train_until
from dhbe.models import Normalized
from dhbe.training.runtime import Runtime
from dhbe.training.schedule import Schedule


class SEAM(Defense):
    """Forget everything on a few images with wrong labels, then learn the clean task again.

    1. On a ``share`` of the clean images, labels drawn anew in every batch among the other
       classes, until accuracy on the true labels falls to ``forgotten``.
    2. On all clean images with their labels, until an epoch's accuracy reaches ``recovered``.

    Accuracies are measured in training mode, on the augmented batches.

    Args:
        share: of the granted images that are forgotten, at least two images.
        forget_schedule, recover_schedule: at most so many epochs of steps 1 and 2.
    """

    needs: ClassVar[Budget] = Budget(fraction=1e-9)

    def __init__(
        self,
        *,
        share: Annotated[float, Gt(0), Le(1)],
        forgotten: Annotated[float, Ge(0), Le(1)],
        recovered: Annotated[float, Ge(0), Le(1)],
        forget_schedule: Schedule,
        recover_schedule: Schedule,
    ) -> None:
        self.share, self.forgotten, self.recovered = share, forgotten, recovered
        self.forget_schedule, self.recover_schedule = forget_schedule, recover_schedule

    def repair(self, network: Normalized, data: DefenderData, runtime: Runtime) -> Normalized:
        clean, classes = data.clean(), network.spec.classes
        order = torch.randperm(len(clean), generator=runtime.rng("seam"))

        def forget(logits: Tensor, batch: Batch) -> Tensor:
            return F.cross_entropy(logits, wrong(batch.labels, classes, batch.rng))

        reached = train_until(
            network,
            clean.subset(order[: max(2, round(self.share * len(clean)))].sort().values),
            self.forget_schedule,
            runtime,
            name="forget",
            loss=forget,
            stop=lambda accuracy: accuracy <= self.forgotten,
        )
        regained = train_until(
            network,
            clean,
            self.recover_schedule,
            runtime,
            name="recover",
            loss=lambda logits, batch: F.cross_entropy(logits, batch.labels),
            stop=lambda accuracy: accuracy >= self.recovered,
            every="epoch",
        )
        runtime.recorder.notes.append(
            f"seam forgot to an accuracy of {reached:.2f} ({self.forgotten:.2f} wanted) and "
            f"recovered {regained:.3f} ({self.recovered:.3f} wanted) on its images"
        )
        return network


def wrong(labels: Tensor, classes: int, rng: torch.Generator) -> Tensor:
    """Labels (B,) drawn evenly among the other classes than ``labels`` (B,)."""
    steps = torch.randint(1, classes, labels.shape, generator=rng, device=rng.device)
    return (labels + steps.to(labels.device)) % classes
