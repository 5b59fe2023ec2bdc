"""Post-activation ResNets for small images: torchvision's with a CIFAR stem, and a tiny one."""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

import torchvision
from annotated_types import Ge, Len
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock


def resnet(
    *,
    depth: Literal[18, 34, 50],
    stem: Literal["cifar", "dhbe64", "imagenet"],
    classes: int,
    channels: int,
    image_size: int,
) -> nn.Module:
    """Torchvision's ResNet with a stem for the image size.

    Args:
        stem: ``cifar`` 3x3 stride 1 without max-pool (11.17 M parameters at depth 18, 10 classes);
            ``dhbe64`` 5x5 stride 2, padding 1, without max-pool (DHBE's 64-pixel networks);
            ``imagenet`` the original 7x7 stride 2 with max-pool.
    """
    del image_size
    network: Any = getattr(torchvision.models, f"resnet{depth}")(num_classes=classes)
    if stem == "imagenet":
        network.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
    else:
        kernel, stride = (3, 1) if stem == "cifar" else (5, 2)
        network.conv1 = nn.Conv2d(channels, 64, kernel, stride, 1, bias=False)
        network.maxpool = nn.Identity()
    built: nn.Module = network
    return built


class SmallResNet(nn.Module):
    """One stage of basic blocks per width, each halving the resolution but the first.

    Args:
        widths: channels of the stages; at least 16, because with fewer than fill one vector
            register the channels-last 1x1 stride-2 convolution of torch 2.15 writes outside its
            memory (below 8 with AVX2, below 16 with AVX-512).
        blocks: basic blocks per stage.
        stem_stride: 2 halves the resolution at once: a quarter of the cost, for CPUs.
    """

    def __init__(
        self,
        *,
        widths: Annotated[list[Annotated[int, Ge(16)]], Len(1)],
        blocks: Annotated[int, Ge(1)],
        stem_stride: Literal[1, 2],
        classes: int,
        channels: int,
        image_size: int,
    ) -> None:
        super().__init__()
        del image_size
        self.stem = nn.Sequential(
            nn.Conv2d(channels, widths[0], 3, stem_stride, 1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
        )
        self.stages = nn.Sequential(
            _stage(widths[0], widths[0], blocks, stride=1),
            *(_stage(a, b, blocks, stride=2) for a, b in itertools.pairwise(widths)),
        )
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        features = self.stages(self.stem(x)).mean(dim=(2, 3))  # (B, widths[-1])
        logits: Tensor = self.head(features)
        return logits


def _stage(width_in: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    shortcut = None
    if stride != 1 or width_in != width:
        shortcut = nn.Sequential(
            nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width)
        )
    first = BasicBlock(width_in, width, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(width, width) for _ in range(blocks - 1)))
