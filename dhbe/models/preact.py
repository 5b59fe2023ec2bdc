"""Pre-activation networks: PreActResNet (He et al. 2016) and Wide ResNet (Zagoruyko 2016)."""

from __future__ import annotations

import itertools
from typing import Annotated

from annotated_types import Ge, Predicate
from torch import Tensor, nn
from torch.nn import functional as F


class PreActBlock(nn.Module):
    """BN-ReLU-conv twice; the convolutional shortcut, where needed, starts after the first ReLU.

    A module of another kind in its place sees the block's input, as the identity does.
    """

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or width_in != width:
            self.shortcut = nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, C_in, H, W) -> (B, C_out, H / stride, W / stride)."""
        activated = F.relu(self.bn1(x))
        skipped = activated if isinstance(self.shortcut, nn.Conv2d) else x
        if self.shortcut is not None:
            skipped = self.shortcut(skipped)
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(activated)))) + skipped
        return out


def _stages(widths: list[int], blocks: int) -> nn.Sequential:
    layers = []
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        layers.append(PreActBlock(a, b, 1 if i == 0 else 2))
        layers += [PreActBlock(b, b, 1) for _ in range(blocks - 1)]
    return nn.Sequential(*layers)


class PreActResNet18(nn.Module):
    """CIFAR PreActResNet-18 as the field uses it: no BatchNorm after the last block."""

    def __init__(self, *, classes: int, channels: int, image_size: int) -> None:
        super().__init__()
        del image_size
        self.conv1 = nn.Conv2d(channels, 64, 3, 1, 1, bias=False)
        self.blocks = _stages([64, 64, 128, 256, 512], blocks=2)
        self.head = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (B, C, H, W) -> logits (B, classes)."""
        logits: Tensor = self.head(self.blocks(self.conv1(x)).mean(dim=(2, 3)))
        return logits


class WideResNet(nn.Module):
    """WRN-depth-widen without dropout.

    Args:
        depth: 6n + 4 convolutional layers (16, 22, 28, 40, ...).
        widen: factor on the widths 16, 32, 64.
    """

    def __init__(
        self,
        *,
        depth: Annotated[int, Ge(10), Predicate(lambda d: d % 6 == 4)],
        widen: Annotated[int, Ge(1)],
        classes: int,
        channels: int,
        image_size: int,
    ) -> None:
        super().__init__()
        del image_size
        widths = [16, 16 * widen, 32 * widen, 64 * widen]
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.blocks = _stages(widths, blocks=(depth - 4) // 6)
        self.bn = nn.BatchNorm2d(widths[-1])
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (B, C, H, W) -> logits (B, classes)."""
        features = F.relu(self.bn(self.blocks(self.conv1(x)))).mean(dim=(2, 3))
        logits: Tensor = self.head(features)
        return logits
