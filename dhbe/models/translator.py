"""Networks from image to image: what attacks with a learned trigger generate it with."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Translator(nn.Module):
    """Two conv-BatchNorm-ReLU blocks per level, max-pool down, bilinear up, a 3x3 conv at the end.

    The generators of the input-aware attack; with ``skips`` a U-Net (LIRA, ISSBA). Any image size.

    Args:
        channels_in, channels_out: of the images; the output is unbounded.
        widths: channels of the levels, from full resolution down.
        skips: give each level up what the level down had.
        normalized: a BatchNorm behind the last convolution (input-aware, LIRA).
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        widths: Sequence[int],
        *,
        skips: bool = False,
        normalized: bool = False,
    ) -> None:
        super().__init__()
        self.skips = skips
        self.down = nn.ModuleList(
            _block(a, b) for a, b in itertools.pairwise([channels_in, *widths])
        )
        back = list(reversed(widths))
        self.middle = _block(back[0], back[0])
        inputs = [2 * w for w in back] if skips else back
        self.up = nn.ModuleList(
            _block(a, b) for a, b in zip(inputs, [*back[1:], back[-1]], strict=True)
        )
        self.out: nn.Module = nn.Conv2d(back[-1], channels_out, 3, padding=1)
        if normalized:
            self.out = nn.Sequential(self.out, nn.BatchNorm2d(channels_out, momentum=0.05))

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> maps (B, C_out, H, W)."""
        passed = []
        for block in self.down:
            x = block(x)
            passed.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for block, left in zip(self.up, reversed(passed), strict=True):
            x = F.interpolate(x, size=left.shape[-2:], mode="bilinear")
            x = block(torch.cat([x, left], dim=1) if self.skips else x)
        out: Tensor = self.out(x)
        return out


def _block(width_in: int, width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a in (width_in, width):
        layers += [
            nn.Conv2d(a, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width, momentum=0.05),
        ]
        layers += [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)
