"""FT-SAM: fine-tuning with adaptive sharpness-aware minimisation (Zhu et al., ICCV 2023)."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from torch.nn import functional as F

from dhbe.contracts.defense import Defense
from dhbe.core.types import Batch
from dhbe.data import Budget, DefenderData
from dhbe.models import Normalized
from dhbe.models.hooks import frozen_statistics
from dhbe.training.runtime import Runtime
from dhbe.training.schedule import Schedule, Waves


class FTSAM(Defense):
    """Descend along the gradient at w + e(w), e = rho w^2 g / || |w| g ||, g the gradient at w.

    The pass at w + e leaves the BatchNorm statistics alone.

    Args:
        rho: radius; BackdoorBench: 2 for CIFAR-10, 8 for GTSRB and Tiny-ImageNet.
        label_smoothing: share of the target that the other classes get, in equal parts; 0.1 for
            CIFAR, 0 for GTSRB and Tiny-ImageNet.
        wave: batches in which the schedule's rate runs its course, and after as many more its way
            back (BackdoorBench steps a cosine of 100 epochs in every batch); 0: once in the whole
            training.
    """

    needs: ClassVar[Budget] = Budget(fraction=1e-9)

    def __init__(
        self,
        *,
        rho: Annotated[float, Gt(0)],
        label_smoothing: Annotated[float, Ge(0), Le(0.5)],
        wave: Annotated[int, Ge(0)],
        schedule: Schedule,
    ) -> None:
        self.rho, self.label_smoothing = rho, label_smoothing
        self.wave, self.schedule = wave, schedule

    def repair(self, network: Normalized, data: DefenderData, runtime: Runtime) -> Normalized:
        clean, classes = data.clean(), network.spec.classes
        # F.cross_entropy's share goes to all classes, the true one included.
        smoothing = self.label_smoothing * classes / (classes - 1)

        def loss(net: nn.Module, batch: Batch) -> Tensor:
            x = batch.images
            here = F.cross_entropy(net(x), batch.labels, label_smoothing=smoothing)
            weights = dict(net.named_parameters())
            gradients = torch.autograd.grad(here, list(weights.values()))
            steps = ascent(list(weights.values()), gradients, self.rho)
            moved = {k: w + e for (k, w), e in zip(weights.items(), steps, strict=True)}
            torch.clear_autocast_cache()  # holds copies of the weights at w
            logits = frozen_statistics(net, x, moved)
            return F.cross_entropy(logits, batch.labels, label_smoothing=smoothing)

        runtime.train(network, clean, self.waved(len(clean)), purpose="ft_sam", loss=loss)
        return network

    def waved(self, images: int) -> Schedule:
        """The schedule with a rate that goes down and up again, ``wave`` batches each."""
        if not self.wave:
            return self.schedule
        batches = self.schedule.epochs * max(1, images // self.schedule.batch_size)
        waves = Waves(shape=self.schedule.shape, times=batches / self.wave)
        return replace(self.schedule, shape=waves)


def ascent(weights: list[Tensor], gradients: tuple[Tensor, ...], rho: float) -> list[Tensor]:
    """Adaptive SAM's steps e(w), in the weights' shapes, detached; one norm over all weights."""
    pairs = [(w.detach(), g) for w, g in zip(weights, gradients, strict=True)]
    norm = torch.stack([(w.abs() * g).norm() for w, g in pairs]).norm()
    return [rho * w.square() * g / (norm + 1e-12) for w, g in pairs]
