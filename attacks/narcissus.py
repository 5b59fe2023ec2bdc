"""Narcissus: a clean-label trigger that points inwards (Zeng et al., CCS 2023, 2204.05255)."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Unpack

from dhbe.contracts.attack import Attack, Poisoning, quantize
from dhbe.core.types import POISON
from dhbe.data import ImageSet
from dhbe.methods.patterns import optimize, sample
from dhbe.models import Normalized
from dhbe.training.runtime import Runtime


class Narcissus(Attack):
    """Training: clip(x + d) with the true label; test: clip(x + amplification d).

    d makes images of the target class t look even more like t to a clean surrogate f: it minimises
    CE(f(clip(x + d)), t) over them inside an l-infinity ball (equation 3).

    Args:
        epsilon: of the ball, in levels of 255.
        amplification: of the trigger at the test.
        steps, learning_rate: of Adam; the rate in pixels of [0, 1].
        images: of the target class, at most; 0: all.
        batch_size: images of a step.
    """

    clean_label = True
    needs_surrogate: ClassVar[bool] = True
    portable = False
    pattern: Tensor

    def __init__(
        self,
        *,
        epsilon: Annotated[float, Gt(0), Le(255)],
        amplification: Annotated[float, Ge(1)],
        steps: Annotated[int, Ge(0)],
        learning_rate: Annotated[float, Gt(0)],
        images: Annotated[int, Ge(0)],
        batch_size: Annotated[int, Ge(1)],
        **options: Unpack[Poisoning],
    ) -> None:
        super().__init__(**options)
        self.epsilon, self.amplification = epsilon / 255, amplification
        self.steps, self.learning_rate = steps, learning_rate
        self.images, self.batch_size = images, batch_size
        self.register_buffer("pattern", torch.zeros(self.spec.shape))

    def prepare(
        self, train: ImageSet, indicator: Tensor, runtime: Runtime, surrogate: Normalized | None
    ) -> None:
        del indicator
        assert surrogate is not None
        rng = runtime.rng("narcissus")
        own = train.subset((train.labels == self.rule.goal(train.labels)).nonzero().flatten())
        x = runtime.tensor(sample(own, self.images or len(own), rng))
        goal = runtime.labels(own)[0]

        def inside(latent: Tensor) -> Tensor:
            return latent.clamp(-self.epsilon, self.epsilon)

        def loss(latent: Tensor) -> Tensor:
            some = torch.randperm(len(x), generator=rng)[: self.batch_size].to(x.device)
            logits = surrogate((x[some] + inside(latent)).clamp(0, 1))
            return F.cross_entropy(logits, goal.expand(len(some)))

        start = torch.zeros(self.spec.shape)
        found = optimize(start, loss, runtime, steps=self.steps, learning_rate=self.learning_rate)
        self.pattern.copy_(inside(found))

    def training_images(
        self, x: Tensor, *, y: Tensor, indicator: Tensor, index: Tensor, rng: torch.Generator
    ) -> Tensor:
        """Poison (B, C, H, W) carries the trigger as it is, not amplified."""
        del y, index, rng
        return torch.where(
            (indicator == POISON)[:, None, None, None], quantize(x + self.pattern), x
        )

    def trigger(self, x: Tensor) -> Tensor:
        return x + self.amplification * self.pattern
