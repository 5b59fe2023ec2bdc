"""Frequency triggers in closed form: FTrojan, CTRL and clean-label frequency poisoning.

Adding a magnitude to chosen block-DCT bins of the chroma channels is linear, so the whole pipeline
(colour transform, DCT, add, inverse) is one fixed additive image.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor
from typing_extensions import Unpack

from dhbe.contracts.attack import REFERENCE_SIZE, Attack, Poisoning
from dhbe.core.errors import got

TO_RGB = {"ycrcb": (1.403, -1.058, 1.773), "yuv": (1.14, -0.977, 2.029)}
"""What one unit in both chroma channels adds to red, green and blue (cv2's YCrCb, kornia's YUV)."""


class Frequency(Attack):
    """T(x) = clip(x + c q / 255), q = magnitude sum_(u,v) phi_u phi_v^T, phi the DCT-II basis.

    Sources: FTrojan (Wang et al., ECCV 2022, 2111.10991), CTRL (Li et al., ICCV 2023, 2210.07346),
    frequency poisoning (Yue et al. 2022, 2207.04209). Grey images get q itself. FTrojan's code goes
    through whole numbers on the way (``rounding``), so its trigger depends on the image a little.

    Args:
        color: colour space whose two chroma channels are shifted.
        window: side of a DCT block in pixels; 0 is the whole image, at most the image.
        positions: bins (u, v) of a 32-pixel block; scaled with the block.
        rounding: ``none``, or ``ycrcb``: luma and chroma are rounded, shifted chroma is truncated.
        clean_label: draw poison from the target class and keep its label.
    """

    pattern: Tensor
    shift: Tensor

    def __init__(
        self,
        *,
        color: Literal["ycrcb", "yuv"],
        window: Annotated[int, Ge(0)],
        positions: list[list[Annotated[int, Ge(0)]]],
        magnitude: Annotated[float, Gt(0)],
        rounding: Literal["none", "ycrcb"],
        clean_label: bool,
        **options: Unpack[Poisoning],
    ) -> None:
        self.clean_label = clean_label
        super().__init__(**options)
        size = self.spec.image_size
        side = min(window or size, size)
        if not positions or any(len(p) != 2 or max(p) >= REFERENCE_SIZE for p in positions):
            raise got("attack.positions", positions, "pairs of bins 0..31 of a 32-pixel block")
        block = torch.zeros(side, side)
        for u, v in positions:
            rows, columns = (cosine(min(side - 1, round(k * side / 32)), side) for k in (u, v))
            block += magnitude / 255 * torch.outer(rows, columns)
        repeats = math.ceil(size / side)
        q = block.repeat(repeats, repeats)[:size, :size]
        self.rounds = rounding == "ycrcb" and self.spec.channels == 3
        self.register_buffer("shift", 255 * q, persistent=False)
        weights = torch.tensor(TO_RGB[color]) if self.spec.channels == 3 else torch.ones(1)
        self.register_buffer("pattern", weights[:, None, None] * q)

    def trigger(self, x: Tensor) -> Tensor:
        return shifted(x, self.shift) if self.rounds else x + self.pattern


def shifted(x: Tensor, shift: Tensor) -> Tensor:
    """Images (B, 3, H, W) after YCrCb in whole numbers, both chroma channels moved, and back.

    As in the official code, but that it wraps around at 0 and 255, and its luma, too, may lose a
    level by truncation.

    Args:
        shift: in levels of 255 (H, W).
    """
    red, green, blue = (255 * x).round().unbind(1)
    luma = (0.299 * red + 0.587 * green + 0.114 * blue).round()
    chroma = [(c * (v - luma)).round() + 128 for c, v in ((0.713, red), (0.564, blue))]
    cr, cb = ((c.clamp(0, 255) + shift).floor().clamp(0, 255) - 128 for c in chroma)
    back = (luma + 1.403 * cr, luma - 0.714 * cr - 0.344 * cb, luma + 1.773 * cb)
    return torch.stack(back, 1).round() / 255


def cosine(k: int, size: int) -> Tensor:
    """Basis vector (size,) number k, 0 to size - 1, of the orthonormal DCT-II."""
    scale = math.sqrt((1 if k == 0 else 2) / size)
    return scale * torch.cos(math.pi * (2 * torch.arange(size) + 1) * k / (2 * size))
