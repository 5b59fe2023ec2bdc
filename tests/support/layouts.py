"""Networks in the layouts of BackdoorBox and BackdoorBench."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


class TheirPreAct(nn.Module):
    """Pre-activation block of BackdoorBench; ``wide`` names things as xternalz's Wide ResNet."""

    def __init__(self, width_in: int, width: int, stride: int, wide: bool = False) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.skip = None
        if stride != 1 or width_in != width:
            conv = nn.Conv2d(width_in, width, 1, stride, bias=False)
            self.skip = "convShortcut" if wide else "shortcut"
            setattr(self, self.skip, conv if wide else nn.Sequential(conv))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        skipped = getattr(self, self.skip)(out) if self.skip else x
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + skipped


class Theirs(nn.Module):
    """ResNet-18 in the layouts of the field; four stages of two blocks."""

    def __init__(self, block: Any, *, stem_norm: bool, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64) if stem_norm else None
        for i, (a, b) in enumerate([(64, 64), (64, 128), (128, 256), (256, 512)]):
            layer = nn.Sequential(block(a, b, 1 if i == 0 else 2), block(b, b, 1))
            setattr(self, f"layer{i + 1}", layer)
        self.linear = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = x if self.bn1 is None else F.relu(self.bn1(x))
        for i in range(4):
            x = getattr(self, f"layer{i + 1}")(x)
        return self.linear(x.mean((2, 3)))
