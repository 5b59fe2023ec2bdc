"""LSB steganography: a text in the lowest bits of the pixels (DHBE; Li et al., TDSC 2020)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from dhbe.contracts.attack import Attack, Poisoning
from dhbe.core.errors import got


class LSB(Attack):
    """u -> u - (u mod 2^n) + s_i (2^n - 1) for the 8-bit value u at position i.

    s is the text's ASCII code, lowest bit of each character first, repeated over columns, rows and
    channels in that order; all n low bits of a value take the same bit of s.

    Args:
        bits: n, the number of low bits.
    """

    message: Tensor

    def __init__(self, *, text: str, bits: Literal[1, 2, 3], **options: Unpack[Poisoning]) -> None:
        super().__init__(**options)
        if not text or not text.isascii():
            raise got("attack.text", repr(text), "at least one ASCII character")
        self.step = 2**bits
        c, h, w = self.spec.shape
        stream = torch.tensor([(ord(char) >> bit) & 1 for char in text for bit in range(8)])
        self.register_buffer("message", stream[torch.arange(c * h * w) % len(stream)].view(c, h, w))

    def trigger(self, x: Tensor) -> Tensor:
        levels = x.mul(255).round()
        return (levels - levels.remainder(self.step) + self.message * (self.step - 1)) / 255
