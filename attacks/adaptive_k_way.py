"""Adaptive-k-way: one of four pixels in training, all in the test (Qi et al., ICLR 2023)."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from dhbe.contracts.attack import Attack, Poisoning, quantize
from dhbe.core.types import CLEAN

PLACES = ((16, 11), (27, 5), (7, 30), (22, 22))
"""Rows and columns in a 32-pixel image (source: vtu81/backdoor-toolbox, ``adaptive_k_way.py``)."""
COLOURS = ((92, 0, 24), (88, 112, 110), (0, 32, 46), (11, 49, 95))
"""Of these pixels, in 1/255; grey images get their mean."""


class AdaptiveKWay(Attack):
    """Poison gets the target label; cover images with the same pixels keep theirs.

    Which pixel a training image gets is drawn; the source gives each to a quarter of them.
    """

    masks: Tensor
    colours: Tensor

    def __init__(self, **options: Unpack[Poisoning]) -> None:
        super().__init__(**options)
        side = max(1, round(self.scale))
        masks = torch.zeros(len(PLACES), 1, self.spec.image_size, self.spec.image_size)
        for mask, place in zip(masks, PLACES, strict=True):
            row, column = (int(p * self.scale) for p in place)
            mask[:, row : row + side, column : column + side] = 1
        colours = torch.tensor(COLOURS, dtype=torch.float32) / 255
        if self.spec.channels != colours.shape[1]:
            colours = colours.mean(1, keepdim=True).expand(-1, self.spec.channels)
        self.register_buffer("masks", masks)
        self.register_buffer("colours", quantize(colours)[:, :, None, None])

    def trigger(self, x: Tensor) -> Tensor:
        for mask, colour in zip(self.masks, self.colours, strict=True):
            x = torch.where(mask > 0, colour, x)
        return x

    def training_images(
        self, x: Tensor, *, y: Tensor, indicator: Tensor, index: Tensor, rng: torch.Generator
    ) -> Tensor:
        del y, index
        pick = torch.randint(len(PLACES), (len(x),), generator=rng, device=rng.device).to(x.device)
        shown = (self.masks[pick] > 0) & (indicator != CLEAN)[:, None, None, None]
        return torch.where(shown, self.colours[pick], x)
