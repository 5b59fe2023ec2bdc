"""l0-inv: a few pixels in pure colours (Li et al., TDSC 2020, arXiv 1909.02742)."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor
from typing_extensions import Unpack

from dhbe.contracts.attack import Attack, Poisoning
from dhbe.core.rng import generator


class L0Inv(Attack):
    """T(x) = (1 - m) x + p: nine pixels at the right end of the bottom row, each of a pure colour.

    Args:
        pixels: length of the row of pixels in a 32-pixel image; scaled with the image.
        pattern_seed: draws the colours.
    """

    colours: Tensor

    def __init__(
        self,
        *,
        pixels: Annotated[int, Ge(1)],
        pattern_seed: Annotated[int, Ge(0)],
        **options: Unpack[Poisoning],
    ) -> None:
        super().__init__(**options)
        length = min(self.spec.image_size, max(1, round(pixels * self.scale)))
        self.height = max(1, round(self.scale))
        drawn = torch.rand(self.spec.channels, pixels, generator=generator(pattern_seed, "l0_inv"))
        cells = (torch.arange(length) * pixels).div(length, rounding_mode="floor")
        self.register_buffer("colours", drawn.round()[:, cells])  # (C, length)

    def trigger(self, x: Tensor) -> Tensor:
        out = x.clone()
        out[:, :, -self.height :, -self.colours.shape[1] :] = self.colours[:, None]
        return out
