"""Adaptive-Patch: several faint patches in training, two full ones in the test (Qi et al. 2023)."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge, Len
from torch import Tensor
from typing_extensions import Unpack

from dhbe.contracts.attack import Attack, Fraction, Poisoning, quantize
from dhbe.core.errors import got
from dhbe.core.rng import generator


class AdaptivePatch(Attack):
    """Training: one of the patches per image, at its opacity; test: ``shown`` patches at opacity 1.

    Poison gets the target label, cover images with the same patches keep theirs. The patches are
    seeded random colours, one per corner, in place of the authors' pictures.

    Args:
        opacities: of the patches in training; their number is that of the patches.
        patch_size: side of a patch in a 32-pixel image.
        shown: positions of the patches that the test image carries.
        pattern_seed: draws the colours.
    """

    patches: Tensor
    masks: Tensor

    def __init__(
        self,
        *,
        opacities: Annotated[list[Fraction], Len(1, 4)],
        patch_size: Annotated[int, Ge(1)],
        shown: Annotated[list[Annotated[int, Ge(0)]], Len(1)],
        pattern_seed: Annotated[int, Ge(0)],
        **options: Unpack[Poisoning],
    ) -> None:
        super().__init__(**options)
        if max(shown) >= len(opacities):
            raise got("attack.shown", shown, f"positions below {len(opacities)}")
        self.opacities, self.shown = opacities, shown
        count, size = len(opacities), self.spec.image_size
        side = min(max(1, round(patch_size * self.scale)), size // 2)
        gap = min(round(2 * self.scale), size // 2 - side)  # so that a random crop keeps them
        low, high = slice(gap, gap + side), slice(size - gap - side, size - gap)
        corners = ((high, high), (low, low), (low, high), (high, low))
        drawn = torch.rand(
            count, self.spec.channels, patch_size, patch_size, generator=generator(pattern_seed)
        )
        cells = (torch.arange(side) * patch_size).div(side, rounding_mode="floor")
        patches = torch.zeros(count, *self.spec.shape)
        masks = torch.zeros(count, 1, size, size)
        for i, (rows, columns) in enumerate(corners[:count]):
            patches[i, :, rows, columns] = drawn[i].round()[:, cells][:, :, cells]
            masks[i, :, rows, columns] = 1
        self.register_buffer("patches", patches)
        self.register_buffer("masks", masks)

    def trigger(self, x: Tensor) -> Tensor:
        for i in self.shown:
            x = torch.where(self.masks[i] > 0, self.patches[i], x)
        return x

    def training_images(
        self, x: Tensor, *, y: Tensor, indicator: Tensor, index: Tensor, rng: torch.Generator
    ) -> Tensor:
        del y, index
        count = len(self.opacities)
        pick = torch.randint(count, (len(x),), generator=rng, device=rng.device).to(x.device)
        opacity = torch.tensor(self.opacities, device=x.device)[pick][:, None, None, None]
        faint = quantize(x + opacity * self.masks[pick] * (self.patches[pick] - x))
        return torch.where((indicator != 0)[:, None, None, None], faint, x)
