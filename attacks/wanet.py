"""WaNet: an imperceptible warp, trained with noise mode (Nguyen & Tran, ICLR 2021)."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Unpack

from dhbe.contracts.attack import Attack, Poisoning, quantize
from dhbe.core.rng import generator
from dhbe.core.types import COVER
from dhbe.methods.patterns import smooth


class WaNet(Attack):
    """T(x) = grid_sample(x, clamp(I + s / H up(P / mean|P|), -1, 1)), P uniform on a k x k grid.

    Cover images are warped by the same grid plus fresh noise U[-1, 1] / H per pixel and keep their
    label, so that only the one warp is a trigger.

    Args:
        strength: s; the mean displacement is about s / 2 pixels.
        grid: k.
        pattern_seed: draws P.
    """

    controls_training: ClassVar[bool] = True
    warp: Tensor

    def __init__(
        self,
        *,
        strength: Annotated[float, Gt(0)],
        grid: Annotated[int, Ge(2)],
        pattern_seed: Annotated[int, Ge(0)],
        **options: Unpack[Poisoning],
    ) -> None:
        super().__init__(**options)
        size = self.spec.image_size
        coarse = 2 * torch.rand(2, grid, grid, generator=generator(pattern_seed, "wanet")) - 1
        field = smooth(coarse / coarse.abs().mean(), size).permute(1, 2, 0)  # (H, W, 2)
        axis = torch.linspace(-1, 1, size)
        rows, columns = torch.meshgrid(axis, axis, indexing="ij")
        identity = torch.stack([columns, rows], dim=-1)  # grid_sample reads (x, y)
        self.register_buffer("warp", (identity + strength / size * field).clamp(-1, 1))

    def trigger(self, x: Tensor) -> Tensor:
        return self.warped(x, self.warp.expand(len(x), -1, -1, -1))

    def warped(self, x: Tensor, grid: Tensor) -> Tensor:
        """Images (B, C, H, W) sampled at ``grid`` (B, H, W, 2): x and y from -1 to 1, bilinear."""
        return F.grid_sample(x, grid.to(x.dtype), align_corners=True, padding_mode="border")

    def training_images(
        self, x: Tensor, *, y: Tensor, indicator: Tensor, index: Tensor, rng: torch.Generator
    ) -> Tensor:
        out = super().training_images(x, y=y, indicator=indicator, index=index, rng=rng)
        cover = (indicator == COVER).nonzero().flatten()
        size = self.spec.image_size
        noise = torch.rand((len(cover), size, size, 2), generator=rng, device=rng.device)
        grid = (self.warp + (2 * noise.to(x.device) - 1) / size).clamp(-1, 1)
        out[cover] = quantize(self.warped(x[cover], grid))
        return out
