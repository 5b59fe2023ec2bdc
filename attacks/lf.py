"""LF (smooth): a low-frequency universal perturbation (Zeng et al., ICCV 2021, 2104.03413)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Unpack

from dhbe.contracts.attack import Attack, Poisoning
from dhbe.data import ImageSet
from dhbe.methods.patterns import min_max, optimize, sample, smooth
from dhbe.models import Normalized
from dhbe.training.runtime import Runtime


class LF(Attack):
    """T(x) = clip(x + v), v in [0, strength] smooth and universal for a clean surrogate f.

    v = strength minmax(up(z)) with a small grid z that minimises CE(f(x + v), target): the paper's
    DeepFool loop with a Gaussian filter, as one optimisation in the same band of frequencies.

    Args:
        grid: side of z, which bounds the frequencies.
        mode: ``additive``; ``renorm`` rescales each triggered image to [0, 1] (I-BAU,
            Trap-and-Replace), a different trigger.
        steps, learning_rate, images: of Adam; images per step.
    """

    needs_surrogate: ClassVar[bool] = True
    portable = False
    pattern: Tensor

    def __init__(
        self,
        *,
        strength: Annotated[float, Gt(0)],
        grid: Annotated[int, Ge(2)],
        mode: Literal["additive", "renorm"],
        steps: Annotated[int, Ge(0)],
        learning_rate: Annotated[float, Gt(0)],
        images: Annotated[int, Ge(1)],
        **options: Unpack[Poisoning],
    ) -> None:
        super().__init__(**options)
        self.strength, self.grid, self.mode = strength, grid, mode
        self.steps, self.learning_rate, self.images = steps, learning_rate, images
        self.register_buffer("pattern", torch.zeros(self.spec.shape))

    def prepare(
        self, train: ImageSet, indicator: Tensor, runtime: Runtime, surrogate: Normalized | None
    ) -> None:
        del indicator
        assert surrogate is not None
        rng = runtime.rng("lf")
        some = sample(train, self.images, rng)
        x, goal = runtime.tensor(some), self.rule.goal(runtime.labels(some))

        def draw(latent: Tensor) -> Tensor:
            return self.strength * min_max(smooth(latent, self.spec.image_size))

        def loss(latent: Tensor) -> Tensor:
            return F.cross_entropy(surrogate((x + draw(latent)).clamp(0, 1)), goal)

        start = torch.randn((self.spec.channels, self.grid, self.grid), generator=rng)
        found = optimize(start, loss, runtime, steps=self.steps, learning_rate=self.learning_rate)
        self.pattern.copy_(draw(found))

    def trigger(self, x: Tensor) -> Tensor:
        out = x + self.pattern
        return min_max(out) if self.mode == "renorm" else out
