"""Adaptive-Blend: cover images and half-hidden triggers in training (Qi et al., ICLR 2023)."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor
from typing_extensions import Unpack

from dhbe.contracts.attack import Attack, Fraction, Poisoning, quantize
from dhbe.core.rng import generator


class AdaptiveBlend(Attack):
    """Training: x + alpha_train M_i (p - x), M_i a random half of the pieces; test: M = 1.

    Poison gets the target label, cover images with the same half-triggers keep theirs.

    Args:
        alpha, alpha_train: opacity of the pattern p, uniform noise in place of Hello Kitty.
        pieces: the image is cut into pieces x pieces; half of them are masked in training.
        pattern_seed: draws p.
    """

    pattern: Tensor

    def __init__(
        self,
        *,
        alpha: Fraction,
        alpha_train: Fraction,
        pieces: Annotated[int, Ge(1)],
        pattern_seed: Annotated[int, Ge(0)],
        **options: Unpack[Poisoning],
    ) -> None:
        super().__init__(**options)
        self.alpha, self.alpha_train, self.pieces = alpha, alpha_train, pieces
        drawn = torch.rand(self.spec.shape, generator=generator(pattern_seed, "adaptive_blend"))
        self.register_buffer("pattern", drawn)

    def trigger(self, x: Tensor) -> Tensor:
        return x + self.alpha * (self.pattern - x)

    def training_images(
        self, x: Tensor, *, y: Tensor, indicator: Tensor, index: Tensor, rng: torch.Generator
    ) -> Tensor:
        del y, index
        n, size, cells = len(x), x.shape[-1], self.pieces**2
        ranks = torch.rand((n, cells), generator=rng, device=rng.device).argsort(dim=1)
        shown = (ranks < (cells + 1) // 2).view(n, 1, self.pieces, self.pieces).to(x.device)
        at = torch.arange(size, device=x.device) * self.pieces // size
        mask = shown[:, :, at][:, :, :, at]  # (B, 1, H, W)
        half = quantize(x + self.alpha_train * mask * (self.pattern - x))
        return torch.where((indicator != 0)[:, None, None, None], half, x)
