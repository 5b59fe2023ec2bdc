"""VGG for 32-pixel images, and any classifier of timm or torchvision."""

from __future__ import annotations

from typing import Any, Literal

import timm
import torchvision
from torch import nn

from dhbe.core.errors import ConfigError


def vgg19_bn(*, classes: int, channels: int, image_size: int) -> nn.Module:
    """VGG19-BN with one linear layer as its classifier, as it is used on CIFAR."""
    return vgg_bn(depth=19, classes=classes, channels=channels, image_size=image_size)


def vgg_bn(
    *, depth: Literal[11, 13, 16, 19], classes: int, channels: int, image_size: int
) -> nn.Module:
    """VGG with BatchNorm and one linear layer on globally pooled features (the CIFAR form)."""
    del image_size
    network: Any = getattr(torchvision.models, f"vgg{depth}_bn")(num_classes=classes)
    if channels != 3:
        network.features[0] = nn.Conv2d(channels, 64, 3, padding=1)
    network.avgpool = nn.AdaptiveAvgPool2d(1)
    network.classifier = nn.Linear(512, classes)
    built: nn.Module = network
    return built


class PlainVGG(nn.Sequential):
    """Plain convolutional network: conv-BN-ReLU layers with max-pooling, global pooling, linear.

    Args:
        layers: widths in order, 0 for a 2x2 max-pooling.
    """

    def __init__(self, *, layers: list[int], classes: int, channels: int, image_size: int) -> None:
        del image_size
        modules: list[nn.Module] = []
        width = channels
        for w in layers:
            if w == 0:
                modules.append(nn.MaxPool2d(2))
                continue
            conv = nn.Conv2d(width, w, 3, padding=1, bias=False)
            modules += [conv, nn.BatchNorm2d(w), nn.ReLU(inplace=True)]
            width = w
        pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]
        super().__init__(*modules, *pooled)


def from_timm(
    *, name: str, options: dict[str, Any], classes: int, channels: int, image_size: int
) -> nn.Module:
    """``timm.create_model(name)`` with random weights (nothing is downloaded).

    Args:
        options: further arguments of the timm model, such as ``patch_size`` of a ViT.

    Raises:
        ConfigError: timm does not know the name, or the model refuses an option.
    """
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:8]) or "timm.list_models()"
        raise ConfigError(f"model.name={name}: not a timm model; some that are: {near}")
    takes_size = any(family in name for family in ("vit", "deit", "swin", "mixer"))
    size: dict[str, Any] = {"img_size": image_size} if takes_size else {}
    try:
        network: nn.Module = timm.create_model(
            name, pretrained=False, num_classes=classes, in_chans=channels, **size, **options
        )
    except (TypeError, AssertionError, RuntimeError) as error:
        raise ConfigError(f"model.name={name}, model.options={options}: {error}") from error
    return network


def from_torchvision(
    *, name: str, options: dict[str, Any], classes: int, channels: int, image_size: int
) -> nn.Module:
    """``torchvision.models.get_model(name)`` with random weights (nothing is downloaded).

    Args:
        options: further arguments of the torchvision model.

    Raises:
        ConfigError: torchvision does not know the name, or the model refuses an option.
    """
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ConfigError(f"model.name={name}: expected one of torchvision's {', '.join(known)}")
    size: dict[str, Any] = {"image_size": image_size} if name.startswith("vit") else {}
    try:
        network: nn.Module = torchvision.models.get_model(
            name, weights=None, num_classes=classes, **size, **options
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.name={name}, model.options={options}: {error}") from error
    if channels != 3:
        place, old = next((n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d))
        parent, _, attribute = place.rpartition(".")
        new = nn.Conv2d(
            channels,
            old.out_channels,
            old.kernel_size,  # type: ignore[arg-type]
            old.stride,  # type: ignore[arg-type]
            old.padding,  # type: ignore[arg-type]
            bias=old.bias is not None,
        )
        setattr(network.get_submodule(parent), attribute, new)
    return network
