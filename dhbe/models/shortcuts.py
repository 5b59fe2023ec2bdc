"""Residual blocks and their shortcuts: finding them, and scaling a shortcut in place."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from dhbe.core.errors import ConfigError
from dhbe.core.rng import generator
from dhbe.models.normalized import Normalized

NAMES = ("downsample", "shortcut")
"""What blocks call a shortcut with weights: torchvision, and most others."""


def blocks(network: nn.Module, *, least: int = 1, method: str = "") -> list[nn.Module]:
    """Residual blocks (modules with two convolutions and a shortcut) in order of definition.

    Raises:
        ConfigError: fewer than ``least``; names the defenses that need none.
    """
    found = [m for m in network.modules() if hasattr(m, "conv2") and shortcut_name(m) is not None]
    if len(found) < least:
        raise ConfigError(
            f"defense={method}: the network has {len(found)} residual blocks, {least} are needed; "
            "use a ResNet or Wide ResNet, or a defense that works on any network (docs/purify.md)"
        )
    return found


def filters(network: nn.Module) -> list[nn.Conv2d]:
    """Convolutions outside of shortcuts, in order of definition."""
    return [
        module
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d) and not any(shortcut in name for shortcut in NAMES)
    ]


def shortcut_name(block: nn.Module) -> str | None:
    """Attribute of a residual block that holds its shortcut (None inside: the identity)."""
    return next((n for n in NAMES if hasattr(block, n)), None)


class Gate(nn.Module):
    """A shortcut times a factor; ``inner`` is None for the identity."""

    def __init__(self, inner: nn.Module | None, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, C, H, W) -> those of the shortcut, times the factor of the gate."""
        passed: Tensor = x if self.inner is None else self.inner(x)
        return self.factor * passed


def scalable_layer(block: nn.Module) -> nn.Conv2d | nn.BatchNorm2d | None:
    """The last layer of a block's shortcut, if a factor on its weights is one on the shortcut."""
    inner = getattr(block, shortcut_name(block) or "")
    layers = [] if inner is None else [*inner.modules()]
    last = next((m for m in reversed(layers) if not isinstance(m, nn.Identity)), None)
    if isinstance(last, nn.Conv2d) or (isinstance(last, nn.BatchNorm2d) and last.affine):
        return last
    return None


def scale_shortcut(block: nn.Module, factor: float) -> None:
    """Multiply a block's shortcut by ``factor``, in place: in its weights where it has them."""
    last = scalable_layer(block)
    if last is None:
        name = shortcut_name(block)
        assert name is not None
        setattr(block, name, Gate(getattr(block, name), factor))
        return
    with torch.no_grad():
        last.weight.mul_(factor)
        if last.bias is not None:
            last.bias.mul_(factor)


@torch.no_grad()
def gate_is_exact(network: Normalized, position: int) -> bool:
    """Whether a gate in a block's shortcut gates it: with factor 1 no logit and no key changes.

    Other libraries' blocks may hand a module what they do not hand on without one.
    """
    gated = copy.deepcopy(network)
    scale_shortcut(blocks(gated)[position], 1.0)
    probe = torch.rand(network.probe().shape, generator=generator(0)).to(network.mean)
    same = gated.state_dict().keys() == network.state_dict().keys()
    return same and torch.allclose(gated(probe), network(probe))


def stage_of(network: nn.Module, block: nn.Module) -> list[nn.Module]:
    """Blocks beside ``block``, with as many channels: its stage."""
    parent = next(m for m in network.modules() if any(c is block for c in m.children()))

    def width(module: nn.Module) -> int:
        last = getattr(module, "conv2", None)
        return last.out_channels if isinstance(last, nn.Conv2d) else -1

    return [c for c in parent.children() if width(c) == width(block)]
