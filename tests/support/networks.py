"""Networks as others write them, for files in their layouts; none is this project's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Padded(nn.Module):
    """Option A of He et al., as akamaster writes it."""

    def __init__(self, more: int) -> None:
        super().__init__()
        self.left, self.right = more // 2, more - more // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.left, self.right))


class Block(nn.Module):
    """Basic block; ``shortcut`` pads, or convolves where ``convolved``."""

    def __init__(self, width_in: int, width: int, stride: int, convolved: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Sequential()
        if stride != 1 or width_in != width:
            conv = nn.Conv2d(width_in, width, 1, stride, bias=False)
            norm = nn.BatchNorm2d(width)
            self.shortcut = nn.Sequential(conv, norm) if convolved else Padded(width - width_in)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """CIFAR ResNet in the layout of akamaster (padded) and kuangliu (convolved).

    Args:
        blocks: per stage.
        head: attribute of the classifier.
        dropout: in front of it, in one ``Sequential``.
    """

    def __init__(
        self,
        width: int = 4,
        blocks: tuple[int, ...] = (1, 1, 1),
        *,
        convolved: bool = False,
        channels: int = 3,
        classes: int = 5,
        head: str = "linear",
        dropout: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.stages, before = len(blocks), width
        for i, count in enumerate(blocks):
            after, layers = width * 2**i, []
            for j in range(count):
                layers.append(Block(before, after, 2 if i and not j else 1, convolved))
                before = after
            self.add_module(f"layer{i + 1}", nn.Sequential(*layers))
        linear: nn.Module = nn.Linear(before, classes)
        self.head = head
        self.add_module(head, nn.Sequential(nn.Dropout(0.5), linear) if dropout else linear)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for i in range(self.stages):
            x = getattr(self, f"layer{i + 1}")(x)
        logits: Tensor = getattr(self, self.head)(x.mean((2, 3)))
        return logits


class PreActBlock(nn.Module):
    """Pre-activation block of BackdoorBench; ``wide`` names things as xternalz's Wide ResNet."""

    def __init__(self, width_in: int, width: int, stride: int, wide: bool) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.skip = ""
        if stride != 1 or width_in != width:
            conv = nn.Conv2d(width_in, width, 1, stride, bias=False)
            self.skip = "convShortcut" if wide else "shortcut"
            self.add_module(self.skip, conv if wide else nn.Sequential(conv))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        skipped = getattr(self, self.skip)(out) if self.skip else x
        added: Tensor = self.conv2(F.relu(self.bn2(self.conv1(out)))) + skipped
        return added


class PreAct(nn.Module):
    """PreAct-ResNet-18 of BackdoorBench and WaNet."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        widths = [64, 64, 128, 256, 512]
        for i in range(4):
            blocks = [PreActBlock(widths[i], widths[i + 1], 2 if i else 1, False)]
            blocks.append(PreActBlock(widths[i + 1], widths[i + 1], 1, False))
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.linear = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for i in range(4):
            x = getattr(self, f"layer{i + 1}")(x)
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


class Wide(nn.Module):
    """Wide ResNet of xternalz, NAD and ANP."""

    def __init__(self, depth: int = 16, widen: int = 1, classes: int = 5) -> None:
        super().__init__()
        widths = [16, 16 * widen, 32 * widen, 64 * widen]
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        for i in range(3):
            stage, blocks = (
                nn.Module(),
                [PreActBlock(widths[i], widths[i + 1], 2 if i else 1, True)],
            )
            for _ in range((depth - 4) // 6 - 1):
                blocks.append(PreActBlock(widths[i + 1], widths[i + 1], 1, True))
            stage.layer = nn.Sequential(*blocks)
            self.add_module(f"block{i + 1}", stage)
        self.bn1, self.fc = nn.BatchNorm2d(widths[3]), nn.Linear(widths[3], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for i in range(3):
            x = getattr(self, f"block{i + 1}").layer(x)
        logits: Tensor = self.fc(F.relu(self.bn1(x)).mean((2, 3)))
        return logits


class VGG(nn.Module):
    """VGG with BatchNorm of kuangliu: no hidden layer behind the pooling."""

    PLAN = (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0)

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width in self.PLAN:
            if not width:
                layers.append(nn.MaxPool2d(2, 2))
                continue
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        self.features = nn.Sequential(*layers, nn.AvgPool2d(1, 1))
        self.classifier = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits


class Flat(nn.Module):
    """A network that no list knows: convolutions, ``view``, linear layers; perhaps a softmax."""

    def __init__(self, channels: int = 1, side: int = 28, softmax: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(channels, 8, 5), nn.ReLU(), nn.AvgPool2d(2))
        self.fc1 = nn.Sequential(nn.Linear(8 * ((side - 4) // 2) ** 2, 16), nn.ReLU())
        last = [nn.Softmax(dim=-1)] if softmax else []
        self.fc2 = nn.Sequential(nn.Linear(16, 5), *last)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        outputs: Tensor = self.fc2(self.fc1(x.view(x.size(0), -1)))
        return outputs


class Pair(nn.Module):
    """Returns features beside the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.conv(x).mean((2, 3))
        return self.out(features), features


class First(nn.Module):
    """The logits of ``Pair`` alone, as its refusal advises; keys as in its file."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["pair"] = pair = Pair()
        self.conv, self.out = pair.conv, pair.out

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.out(self.conv(x).mean((2, 3)))
        return logits


class Doubled(nn.Module):
    """Student and teacher of one network in one module, as distillation keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = ResNet(), ResNet()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.student(x)
        return logits


def shaken(network: nn.Module, seed: int = 0) -> nn.Module:
    """The network in eval mode, every weight and statistic drawn anew and away from its start."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if value.is_floating_point():
                drawn = torch.rand(value.shape, generator=rng)
                value.copy_(
                    drawn + 0.5
                    if "var" in name
                    else (drawn - 0.5) / max(value[:1].numel(), 1) ** 0.5
                )
    return network.eval()
