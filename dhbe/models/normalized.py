"""Normalisation as the network's first layer: outside it there are RGB pixels in [0, 1]."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from dhbe.core.errors import ConfigError
from dhbe.core.rng import fork
from dhbe.core.types import DataSpec


class Normalized(nn.Module):
    """Network over RGB pixels: ``network((x - mean) / std)``, x turned to the network's order.

    Args:
        network: takes normalised images (B, C, H, W), gives logits (B, classes).
        spec: holds mean and std per channel, and the order of the channels.

    Attributes:
        unwritten: what no weight says of this network, in words: one of the suspect's architecture
            that loads its weights computes something else.
    """

    unwritten: str = ""
    mean: Tensor
    std: Tensor
    network: nn.Module

    def __init__(self, network: nn.Module, spec: DataSpec) -> None:
        super().__init__()
        self.network, self.spec = network, spec
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(spec.std).view(1, -1, 1, 1))

    def normalize(self, x: Tensor) -> Tensor:
        """RGB pixels (B, C, H, W) in [0, 1] -> the network's input space."""
        return (self.turned(x) - self.mean) / self.std

    def denormalize(self, x_norm: Tensor) -> Tensor:
        """The network's input space (B, C, H, W) -> RGB pixels, not clipped to [0, 1]."""
        return self.turned(x_norm * self.std + self.mean)

    def turned(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) with channels turned from RGB to the network's order, or back."""
        return x.flip(1) if self.spec.order == "bgr" else x

    def around(self, network: nn.Module) -> Normalized:
        """Another network behind this normalisation, on the same device."""
        wrapped = Normalized(network, self.spec)
        return wrapped.to(self.mean.device, self.mean.dtype)

    def probe(self, batch_size: int = 2) -> Tensor:
        """Black images (batch_size, C, H, W), for a forward pass that only asks for shapes."""
        return self.mean.new_zeros((batch_size, *self.spec.shape))

    def forward(self, x: Tensor) -> Tensor:
        """Pixels (B, C, H, W) in [0, 1] -> logits (B, classes)."""
        logits: Tensor = self.network(self.normalize(x))
        return logits


def fresh(network: Normalized, seed: int, *, method: str) -> Normalized:
    """The same architecture with newly drawn weights, for defenses that train from scratch.

    Raises:
        ConfigError: the network has weights that nothing in it can draw anew, so they would still
            be the suspect's; names defenses that need no new start.
    """
    drawn = copy.deepcopy(network).cpu()
    before = {k: p.detach().clone() for k, p in drawn.named_parameters()}
    modules = [*drawn.modules()]
    with fork(seed):
        for module in modules:
            _call(module, "reset_parameters")
        for module in reversed(modules):  # as in construction: what a module does to its parts
            _call(module, "_reset_parameters")
            _call(module, "init_weights")
    kept = [k for k, p in drawn.named_parameters() if torch.equal(p, before[k]) and _varies(p)]
    if kept:
        raise ConfigError(
            f"defense={method}: it trains anew, but nothing in the network draws "
            f"{', '.join(kept[:4])}{' ...' if len(kept) > 4 else ''} anew; use another model, or a "
            "defense that repairs the trained network instead"
        )
    return drawn.to(network.mean.device, network.mean.dtype)


def _call(module: nn.Module, name: str) -> None:
    method = getattr(module, name, None)
    if callable(method):
        method()


def _varies(value: Tensor) -> bool:
    return value.numel() > 0 and bool((value != value.flatten()[0]).any())
