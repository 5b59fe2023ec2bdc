"""BPP: fewer colour levels, learned against random residuals (Wang et al., CVPR 2022)."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Le
from torch import Tensor
from typing_extensions import Unpack

from dhbe.contracts.attack import Attack, Poisoning, quantize
from dhbe.core.types import COVER


class BPP(Attack):
    """T(x) = round(x (q - 1)) / (q - 1), without or with Floyd-Steinberg dithering.

    Cover images x_i + (T(x_j) - x_j), with the residual of another image, keep their label: a
    random residual is not the trigger.

    Args:
        levels: q, colour levels per channel.
        dither: spread each pixel's rounding error over its neighbours.
    """

    controls_training: ClassVar[bool] = True

    def __init__(
        self,
        *,
        levels: Annotated[int, Ge(2), Le(255)],
        dither: bool,
        **options: Unpack[Poisoning],
    ) -> None:
        super().__init__(**options)
        self.steps, self.dither = levels - 1, dither

    def squeeze(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1], each value rounded to the nearest colour level."""
        return x.mul(self.steps).round().div(self.steps)

    def trigger(self, x: Tensor) -> Tensor:
        if not self.dither:
            return self.squeeze(x)
        size = x.shape[-1]
        out = torch.nn.functional.pad(x, (1, 1, 0, 1))  # room for errors at the border
        for row in range(size):
            for column in range(1, size + 1):
                old = out[:, :, row, column].clone()
                new = self.squeeze(old.clamp(0, 1))
                error = old - new
                out[:, :, row, column] = new
                out[:, :, row, column + 1] += error * 7 / 16
                for shift, share in ((-1, 3 / 16), (0, 5 / 16), (1, 1 / 16)):
                    out[:, :, row + 1, column + shift] += error * share
        return out[:, :, :size, 1 : size + 1]

    def training_images(
        self, x: Tensor, *, y: Tensor, indicator: Tensor, index: Tensor, rng: torch.Generator
    ) -> Tensor:
        del rng
        triggered = self.apply(x, y=y, index=index)
        moved = quantize(x + (triggered - x).roll(1, 0))  # batches are drawn at random
        kind = indicator[:, None, None, None]
        return torch.where(kind == COVER, moved, torch.where(kind == 0, x, triggered))
