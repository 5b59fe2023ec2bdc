"""Post-activation ResNets for small images: torchvision's with a CIFAR stem, and a tiny one."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torchvision
from annotated_types import Ge, Len
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock

from dhbe.core.errors import got

Widths = Annotated[list[Annotated[int, Ge(1)]], Len(1)]
SAFE_WIDTH = 16
"""Input channels from which torch's strided 1x1 convolution is used; see ``SubsampledConv``."""


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
        widths: channels of the stages.
        blocks: basic blocks per stage, one number for all or one for each.
        stem_stride: 2 halves the resolution at once: a quarter of the cost, for CPUs.
    """

    def __init__(
        self,
        *,
        widths: Widths,
        blocks: Annotated[int, Ge(1)] | list[Annotated[int, Ge(1)]],
        stem_stride: Literal[1, 2],
        classes: int,
        channels: int,
        image_size: int,
    ) -> None:
        super().__init__()
        del image_size
        counts = [blocks] * len(widths) if isinstance(blocks, int) else blocks
        if len(counts) != len(widths):
            raise got("model.blocks", blocks, f"one number, or {len(widths)} of them")
        steps = zip([widths[0], *widths], widths, counts, strict=False)
        self.stem = nn.Sequential(
            nn.Conv2d(channels, widths[0], 3, stem_stride, 1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
        )
        self.stages = nn.Sequential(
            *(self.stage(a, b, n, stride=2 if i else 1) for i, (a, b, n) in enumerate(steps))
        )
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (B, C, H, W) -> logits (B, classes)."""
        features = self.stages(self.stem(x)).mean(dim=(2, 3))  # (B, widths[-1])
        logits: Tensor = self.head(features)
        return logits

    def stage(self, width_in: int, width: int, blocks: int, stride: int) -> nn.Sequential:
        """Basic blocks, the first of them with the stage's stride."""
        shortcut = None
        if stride != 1 or width_in != width:
            shortcut = self.shortcut(width_in, width, stride)
        first = BasicBlock(width_in, width, stride, shortcut)
        return nn.Sequential(first, *(BasicBlock(width, width) for _ in range(blocks - 1)))

    def shortcut(self, width_in: int, width: int, stride: int) -> nn.Module:
        """What leads around a block that changes resolution or width: a 1x1 convolution."""
        conv = nn.Conv2d if width_in >= SAFE_WIDTH else SubsampledConv
        return nn.Sequential(conv(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))


class CifarResNet(SmallResNet):
    """ResNet-20/32/44/56/110 of He et al. 2016, section 4.2: shortcuts without parameters.

    Args:
        widths: 16, 32, 64 in the paper.
        blocks: n per stage: 6n + 2 layers.
    """

    def __init__(
        self,
        *,
        widths: Widths,
        blocks: Annotated[int, Ge(1)] | list[Annotated[int, Ge(1)]],
        classes: int,
        channels: int,
        image_size: int,
    ) -> None:
        super().__init__(
            widths=widths,
            blocks=blocks,
            stem_stride=1,
            classes=classes,
            channels=channels,
            image_size=image_size,
        )

    def shortcut(self, width_in: int, width: int, stride: int) -> nn.Module:
        """Option A: every ``stride``-th pixel, and zeros for the channels that are missing."""
        return PaddedShortcut(width - width_in, stride)


class PaddedShortcut(nn.Module):
    """Every ``stride``-th pixel, with ``more`` channels of zeros, half of them on either side."""

    def __init__(self, more: int, stride: int) -> None:
        super().__init__()
        self.more, self.stride = more, stride

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, C, H, W) -> (B, C + more, H / stride, W / stride)."""
        kept = x[:, :, :: self.stride, :: self.stride]
        return F.pad(kept, (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))


class SubsampledConv(nn.Conv2d):
    """A strided 1x1 convolution as one without stride of every ``stride``-th pixel.

    With fewer channels than fill one vector register, the channels-last 1x1 stride-2 convolution
    of torch 2.15 writes outside its memory (below 8 with AVX2, below 16 with AVX-512).
    """

    def forward(self, input: Tensor) -> Tensor:
        """Features (B, C_in, H, W) -> (B, C_out, H / stride, W / stride)."""
        down, right = self.stride
        return F.conv2d(input[:, :, ::down, ::right], self.weight, self.bias)
