"""SIG: a sinusoidal signal, clean-label (Barni et al., ICIP 2019, arXiv 1902.11237)."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from annotated_types import Gt
from torch import Tensor
from typing_extensions import Unpack

from dhbe.contracts.attack import Attack, Poisoning


class SIG(Attack):
    """T(x) = clip(x + delta / 255 sin(2 pi f j / W)), j the column.

    Args:
        delta: amplitude in levels of 255.
        frequency: periods across the image.
        mode: ``additive``; ``wrapped_blend`` reproduces the file that NAD, ABL, RNP, Trap-and-
            Replace and NFT use: a sine whose negative half wrapped around in uint8, blended at 0.2.
            Amplitude 20 and 4.1 periods give that file's first values 0, 14, 19, 13, 255, 241.
        clean_label: draw poison from the target class and keep its label, as published.
    """

    wave: Tensor

    def __init__(
        self,
        *,
        delta: Annotated[float, Gt(0)],
        frequency: Annotated[float, Gt(0)],
        mode: Literal["additive", "wrapped_blend"],
        clean_label: bool,
        **options: Unpack[Poisoning],
    ) -> None:
        self.clean_label = clean_label
        super().__init__(**options)
        self.mode = mode
        columns = torch.arange(self.spec.image_size) / self.spec.image_size
        wave = delta / 255 * torch.sin(2 * math.pi * frequency * columns)
        if mode == "wrapped_blend":
            wave = wave.mul(255).trunc().remainder(256).div(255)
        self.register_buffer("wave", wave)

    def trigger(self, x: Tensor) -> Tensor:
        if self.mode == "wrapped_blend":
            return 0.8 * x + 0.2 * self.wave
        return x + self.wave
