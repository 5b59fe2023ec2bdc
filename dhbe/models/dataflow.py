"""Which layer feeds which, found by watching a forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dhbe.core.errors import ConfigError


@torch.no_grad()
def conv_bn_pairs(network: nn.Module, probe: Tensor) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Convolutions whose output itself is a BatchNorm's input, in order of execution.

    A tensor that was changed in place since (``out += shortcut``) is no longer the convolution's
    output, though its id is the same: its version counter tells.

    Args:
        network: in eval mode (its statistics stay as they are).
        probe: any input (B, C, H, W) that the network accepts.
    """
    made: dict[int, tuple[nn.Conv2d, Tensor, int]] = {}  # the tensor is kept: its id stays unique
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []

    def after_conv(module: nn.Module, args: Any, output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        made[id(output)] = (module, output, output._version)

    def before_norm(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.BatchNorm2d)
        conv, _, version = made.get(id(args[0]), (None, None, -1))
        if conv is not None and args[0]._version == version:
            pairs.append((conv, module))

    hooks = [
        m.register_forward_hook(after_conv)
        if isinstance(m, nn.Conv2d)
        else m.register_forward_pre_hook(before_norm)
        for m in network.modules()
        if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))
    ]
    try:
        network(probe)
    finally:
        for hook in hooks:
            hook.remove()
    return pairs


def classifier(network: nn.Module) -> nn.Linear:
    """The last linear layer, whose outputs are the logits.

    Raises:
        ConfigError: there is none.
    """
    linear = [m for m in network.modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise ConfigError("the network has no linear layer; choose another model")
    return linear[-1]


def features(network: nn.Module, x: Tensor) -> Tensor:
    """Inputs (B, F) of the last linear layer for inputs ``x`` (B, C, H, W) of ``network``."""
    return penultimate(network, x)[0]


def penultimate(network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """(features before the last linear layer (B, F), logits (B, classes)); gradients flow."""
    seen: list[Tensor] = []

    def remember(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])

    hook = classifier(network).register_forward_pre_hook(remember)
    try:
        logits = network(x)
    finally:
        hook.remove()
    return seen[-1], logits
