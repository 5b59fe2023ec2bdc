"""Blend: a picture shines through the whole image (Chen et al. 2017, arXiv 1712.05526)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor
from typing_extensions import Unpack

from dhbe.contracts.attack import Attack, Fraction, Poisoning
from dhbe.core.errors import got
from dhbe.core.rng import generator
from dhbe.data import ImageSet
from dhbe.models import Normalized
from dhbe.training.runtime import Runtime


class Blend(Attack):
    """T(x) = (1 - alpha) x + alpha p.

    Args:
        pattern: ``noise`` uniform in [0, 1] (what ANP and NFT call Gaussian); ``cartoon`` coloured
            discs on white, in place of Hello Kitty; ``train_image`` one of the training images
            (DHBE's watermark).
        pattern_seed: draws noise or cartoon.
        image_index: position of the training image.
    """

    pattern: Tensor

    def __init__(
        self,
        *,
        pattern: Literal["noise", "cartoon", "train_image"],
        alpha: Fraction,
        pattern_seed: Annotated[int, Ge(0)],
        image_index: Annotated[int, Ge(0)],
        **options: Unpack[Poisoning],
    ) -> None:
        super().__init__(**options)
        self.alpha, self.kind, self.image_index = alpha, pattern, image_index
        self.portable = pattern != "train_image"
        rng = generator(pattern_seed, "blend")
        drawn = torch.rand(self.spec.shape, generator=rng)
        if pattern == "cartoon":
            drawn = cartoon(self.spec.channels, self.spec.image_size, rng)
        self.register_buffer("pattern", drawn)

    def prepare(
        self, train: ImageSet, indicator: Tensor, runtime: Runtime, surrogate: Normalized | None
    ) -> None:
        del indicator, surrogate
        if self.kind != "train_image":
            return
        if self.image_index >= len(train):
            raise got("attack.image_index", self.image_index, f"below {len(train)}")
        image = train.subset(torch.tensor([self.image_index]))
        self.pattern.copy_(runtime.tensor(image)[0])

    def trigger(self, x: Tensor) -> Tensor:
        return (1 - self.alpha) * x + self.alpha * self.pattern


def cartoon(channels: int, size: int, rng: torch.Generator, discs: int = 8) -> Tensor:
    """White canvas (channels, size, size) of 0 and 1 with discs in saturated colours."""
    at = torch.linspace(0, 1, size)
    canvas = torch.ones(channels, size, size)
    for _ in range(discs):
        row, column, radius = torch.rand(3, generator=rng).tolist()
        inside = (at[:, None] - row) ** 2 + (at - column) ** 2 < (0.05 + 0.1 * radius) ** 2
        colour = torch.rand(channels, 1, generator=rng).round()
        canvas[:, inside] = colour
    return canvas
