"""l2-inv: a faint additive pattern that excites neurons (Li et al., TDSC 2020, 1909.02742)."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt
from torch import Tensor
from typing_extensions import Unpack

from dhbe.contracts.attack import Attack, Poisoning
from dhbe.data import ImageSet
from dhbe.methods.patterns import optimize, sample, selected_features
from dhbe.models import Normalized
from dhbe.training.runtime import Runtime


class L2Inv(Attack):
    """T(x) = clip(x + p) with a fixed ||p||_2.

    p maximises selected penultimate neurons of a clean surrogate on x + p under a penalty on its
    norm, starting from Gaussian noise, and is then scaled to the norm.

    Args:
        norm: l2 norm for a 32-pixel image (the asset that AWM and Trap-and-Replace use has 3.22);
            grows with the image side.
        neurons: how many are excited.
        penalty: weight of the norm in the loss.
        steps, learning_rate, images: of Adam; images per step.
    """

    needs_surrogate: ClassVar[bool] = True
    portable = False
    pattern: Tensor

    def __init__(
        self,
        *,
        norm: Annotated[float, Gt(0)],
        neurons: Annotated[int, Ge(1)],
        penalty: Annotated[float, Ge(0)],
        steps: Annotated[int, Ge(0)],
        learning_rate: Annotated[float, Gt(0)],
        images: Annotated[int, Ge(1)],
        **options: Unpack[Poisoning],
    ) -> None:
        super().__init__(**options)
        self.norm, self.neurons, self.penalty = norm * self.scale, neurons, penalty
        self.steps, self.learning_rate, self.images = steps, learning_rate, images
        self.register_buffer("pattern", torch.zeros(self.spec.shape))

    def prepare(
        self, train: ImageSet, indicator: Tensor, runtime: Runtime, surrogate: Normalized | None
    ) -> None:
        del indicator
        assert surrogate is not None
        rng = runtime.rng("l2_inv")
        x = runtime.tensor(sample(train, self.images, rng))

        def loss(pattern: Tensor) -> Tensor:
            excited = selected_features(surrogate, x + pattern, self.neurons)
            total: Tensor = self.penalty * pattern.norm() - excited.mean()
            return total

        start = 0.01 * torch.randn(self.spec.shape, generator=rng)
        found = optimize(start, loss, runtime, steps=self.steps, learning_rate=self.learning_rate)
        self.pattern.copy_(found * (self.norm / found.norm()))

    def trigger(self, x: Tensor) -> Tensor:
        return x + self.pattern
