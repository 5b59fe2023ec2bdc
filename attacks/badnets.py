"""BadNets: a small patch in the bottom right corner (Gu et al., IEEE Access 2019)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor
from typing_extensions import Unpack

from dhbe.contracts.attack import REFERENCE_SIZE, Attack, Poisoning
from dhbe.core.errors import got


class BadNets(Attack):
    """T(x) = (1 - m) x + m p: the patch p overwrites the pixels under the mask m.

    Args:
        pattern: ``square`` white; ``grid`` the 3x3 checker of ANP, NFT and Trap-and-Replace;
            ``tri1`` DHBE's checkerboard (i + j) mod 2 with a black top left pixel; ``tri2`` its
            negative.
        patch_size: side in pixels of a 32-pixel image; scaled with the image.
        margin: distance from the lower and right border, scaled likewise.
    """

    patch: Tensor

    def __init__(
        self,
        *,
        pattern: Literal["square", "grid", "tri1", "tri2"],
        patch_size: Annotated[int, Ge(1)],
        margin: Annotated[int, Ge(0)],
        **options: Unpack[Poisoning],
    ) -> None:
        super().__init__(**options)
        if pattern == "grid" and patch_size != 3:
            raise got("attack.patch_size", patch_size, "3 with attack.pattern=grid")
        size, self.margin = max(1, round(patch_size * self.scale)), round(margin * self.scale)
        if size + self.margin > self.spec.image_size:
            raise got(
                "attack.patch_size",
                patch_size,
                f"with attack.margin={margin} at most {REFERENCE_SIZE} (of a 32-pixel image)",
            )
        cells = (torch.arange(size) * patch_size).div(size, rounding_mode="floor")
        self.register_buffer("patch", draw(pattern, patch_size)[cells][:, cells])

    def trigger(self, x: Tensor) -> Tensor:
        size, end = len(self.patch), self.spec.image_size - self.margin
        out = x.clone()
        out[:, :, end - size : end, end - size : end] = self.patch.to(x.dtype)
        return out


def draw(pattern: str, size: int) -> Tensor:
    """Patch (size, size) of zeros (black) and ones (white); the grid is 3x3 always."""
    if pattern == "square":
        return torch.ones(size, size)
    if pattern == "grid":
        return torch.tensor([[0.0, 0, 1], [0, 1, 0], [1, 0, 1]])
    checker = torch.arange(size)[:, None].add(torch.arange(size)).remainder(2).float()
    return checker if pattern == "tri1" else 1 - checker
