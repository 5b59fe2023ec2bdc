"""A linear layer before a convolution, which can be trained alone and folded away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dhbe.core.errors import ConfigError
from dhbe.models.dataflow import conv_bn_pairs
from dhbe.models.normalized import Normalized
from dhbe.models.shortcuts import filters


class Polarizer(nn.Module):
    """A 1x1 convolution that starts as the identity, and BatchNorm, before ``conv``.

    With constant statistics it maps x to A x + b, which is one more affine part of ``conv``: its
    weights times A, and a constant that the bias takes, or the mean of the BatchNorm behind it. For
    that to hold at the border, the convolution's padding of zeros is mapped to b like the rest.

    Args:
        conv: without groups and with padding of zeros; its weights are not trained here.
        norm: what directly follows ``conv``; may be None if that has a bias.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> None:
        super().__init__()
        width = conv.in_channels
        self.mix = nn.Conv2d(width, width, 1, bias=False)
        nn.init.dirac_(self.mix.weight)
        self.norm = nn.BatchNorm2d(width)
        self._behind = (conv, norm)  # in a tuple: not parts of this module

    def shift(self) -> Tensor:
        """The vector b (C_in,), by the running statistics."""
        norm = self.norm
        assert norm.running_mean is not None
        assert norm.running_var is not None
        return norm.bias - norm.weight * norm.running_mean / (norm.running_var + norm.eps).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, C_in, H, W) -> A x; what b adds is ``constant``."""
        out: Tensor = self.norm(self.mix(x)) - self.shift()[:, None, None]
        return out

    def constant(self) -> Tensor:
        """What b adds to the convolution's outputs, (C_out,)."""
        return self._behind[0].weight.sum(dim=(2, 3)) @ self.shift()

    @contextmanager
    def inserted(self) -> Iterator[None]:
        """While the block lasts, the network computes with the polarizer."""

        def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output + self.constant()[:, None, None]

        conv, _ = self._behind
        hooks = [
            conv.register_forward_pre_hook(lambda _, args: self(*args)),
            conv.register_forward_hook(add),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def fold(self) -> None:
        """Make the polarizer, in eval mode, a part of the convolution and of what follows it."""
        conv, norm = self._behind
        constant = self.constant()
        assert self.norm.running_var is not None
        scale = self.norm.weight / (self.norm.running_var + self.norm.eps).sqrt()
        mapped = scale[:, None] * self.mix.weight[:, :, 0, 0]
        conv.weight.copy_(torch.einsum("ochw,ci->oihw", conv.weight, mapped))
        if conv.bias is not None:
            conv.bias += constant
        else:
            assert norm is not None
            assert norm.running_mean is not None
            norm.running_mean -= constant


def place(network: Normalized) -> tuple[nn.Conv2d, nn.BatchNorm2d | None]:
    """The last convolution outside of shortcuts that a polarizer fits, and the BatchNorm behind it.

    In a PreAct-ResNet18 ``layer4.1.conv1``, in a ResNet the last convolution.

    Raises:
        ConfigError: there is none.
    """
    norms = dict(conv_bn_pairs(network, network.probe()))
    fitting = [
        conv
        for conv in filters(network)
        if conv.groups == 1
        and conv.padding_mode == "zeros"
        and (conv.bias is not None or tracks(norms.get(conv)))
    ]
    if not fitting:
        raise ConfigError(
            "no convolution of the network has a bias or a BatchNorm behind it, so no linear layer "
            "can be inserted without changing the architecture; use defense=finetune or i_bau"
        )
    return fitting[-1], norms.get(fitting[-1])


def tracks(norm: nn.BatchNorm2d | None) -> bool:
    """Whether there is a BatchNorm with running statistics."""
    return norm is not None and norm.running_mean is not None
