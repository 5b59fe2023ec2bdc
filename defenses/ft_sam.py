"""FT-SAM: fine-tuning with adaptive sharpness-aware minimisation (Zhu et al., ICCV 2023)."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn
from torch.nn import functional as F

from dhbe.contracts.defense import Defense
from dhbe.core.types import Batch
from dhbe.data import Budget, DefenderData
from dhbe.models import Normalized
from dhbe.models.hooks import frozen_statistics
from dhbe.training.runtime import Runtime
from dhbe.training.schedule import Schedule


class FTSAM(Defense):
    """Descend along the gradient at w + e(w), e = rho w^2 g / || |w| g ||, g the gradient at w.

    The pass at w + e leaves the BatchNorm statistics alone.

    Args:
        rho: radius; BackdoorBench: 2 for CIFAR-10, 8 for GTSRB and Tiny-ImageNet.
        label_smoothing: 0.1 for CIFAR, 0 for GTSRB and Tiny-ImageNet.
    """

    needs: ClassVar[Budget] = Budget(fraction=1e-9)

    def __init__(
        self,
        *,
        rho: Annotated[float, Gt(0)],
        label_smoothing: Annotated[float, Ge(0), Lt(1)],
        schedule: Schedule,
    ) -> None:
        self.rho, self.label_smoothing, self.schedule = rho, label_smoothing, schedule

    def repair(self, network: Normalized, data: DefenderData, runtime: Runtime) -> Normalized:

        def loss(net: nn.Module, batch: Batch) -> Tensor:
            x = batch.images
            here = F.cross_entropy(net(x), batch.labels, label_smoothing=self.label_smoothing)
            weights = dict(net.named_parameters())
            gradients = torch.autograd.grad(here, list(weights.values()))
            steps = ascent(list(weights.values()), gradients, self.rho)
            moved = {k: w + e for (k, w), e in zip(weights.items(), steps, strict=True)}
            torch.clear_autocast_cache()  # holds copies of the weights at w
            logits = frozen_statistics(net, x, moved)
            return F.cross_entropy(logits, batch.labels, label_smoothing=self.label_smoothing)

        runtime.train(network, data.clean(), self.schedule, purpose="ft_sam", loss=loss)
        return network


def ascent(weights: list[Tensor], gradients: tuple[Tensor, ...], rho: float) -> list[Tensor]:
    """Adaptive SAM's steps e(w), detached; the norm is over all weights together."""
    pairs = [(w.detach(), g) for w, g in zip(weights, gradients, strict=True)]
    norm = torch.stack([(w.abs() * g).norm() for w, g in pairs]).norm()
    return [rho * w.square() * g / (norm + 1e-12) for w, g in pairs]
