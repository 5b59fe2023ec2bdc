"""Factors on weights: channel masks, element masks, neuron noise; and pruning of channels.

They are parametrizations, so a network keeps its class and its names, any BatchNorm variant works,
and ``fold`` turns the product back into a plain weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dhbe.core.errors import ConfigError


class Scale(nn.Module):
    """w -> w (mask + noise); the mask is a parameter that starts at 1, the noise starts at 0."""

    noise: Tensor

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.ones_like(like))
        self.register_buffer("noise", torch.zeros_like(like))

    def forward(self, weight: Tensor) -> Tensor:
        """Weight of any shape -> the scaled weight; the mask is broadcast."""
        return weight * (self.mask + self.noise)


def batch_norms(network: nn.Module, *, method: str) -> list[nn.BatchNorm2d]:
    """BatchNorms with channel weights, in order of definition.

    Raises:
        ConfigError: there are none; names the defenses that can do without.
    """
    found = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d) and m.affine]
    if not found:
        raise ConfigError(
            f"defense={method}: the network has no BatchNorm, which this method masks; use "
            "a defense that fine-tunes or prunes all weights"
        )
    return found


def attach(modules: Sequence[nn.Module], name: str = "weight") -> list[Scale]:
    """A ``Scale`` on the tensor ``name`` of each module; everything else stays as it is."""
    scales = []
    for module in modules:
        scale = Scale(getattr(module, name))
        parametrize.register_parametrization(module, name, scale)
        scales.append(scale)
    return scales


def fold(modules: Sequence[nn.Module], name: str = "weight", *, keep: bool = True) -> None:
    """Remove the scales; the weights take the scaled values, or their own with ``keep=False``."""
    for module in modules:
        parametrize.remove_parametrizations(module, name, leave_parametrized=keep)


@torch.no_grad()
def clamp(scales: Sequence[Scale], low: float = 0.0, high: float = 1.0) -> None:
    """Bring all masks back into [low, high]."""
    for scale in scales:
        scale.mask.clamp_(low, high)


@torch.no_grad()
def prune(layers: Sequence[nn.BatchNorm2d], scores: Sequence[Tensor], threshold: float) -> int:
    """Set gamma = 0 where a channel's score (C,) is at most the threshold; returns the number."""
    count = 0
    for layer, score in zip(layers, scores, strict=True):
        out = score <= threshold
        layer.weight[out] = 0
        count += int(out.sum())
    return count
