"""Adversarial images and universal perturbations, shared by attacks and defenses."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dhbe.core.types import Batch


def pgd(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    step_size: float,
    steps: int,
    clip: bool = True,
) -> Tensor:
    """Images after projected ascent on CE(network(x), y) inside an l-infinity ball.

    Madry et al. 2018, untargeted, without random start; the network's mode stays as it is.

    Args:
        x: images (B, C, H, W) in [0, 1].
        epsilon, step_size: in units of pixels in [0, 1].
        clip: stay in [0, 1].
    """
    moved = x
    for _ in range(steps):
        moved = moved.detach().requires_grad_(True)
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(F.cross_entropy(network(moved), y), moved)
        moved = moved + step_size * gradient.sign()
        moved = moved.clamp(x - epsilon, x + epsilon)
        moved = moved.clamp(0, 1) if clip else moved
    return moved.detach()


def universal(
    network: nn.Module, batches: Iterable[Batch], *, learning_rate: float, penalty: float = 0.0
) -> Tensor:
    """One perturbation (1, C, H, W) that changes the predictions of all images.

    SGD ascent from zero over the batches on CE(f(x + d), argmax f(x)) - penalty |d|^2 (AWM, I-BAU);
    neither d nor x + d is clipped.
    """
    delta: Tensor | None = None
    for batch in batches:
        x = batch.images
        if delta is None:
            delta = torch.zeros_like(x[:1])
        delta.requires_grad_(True)
        with torch.no_grad():
            predicted = network(x).argmax(dim=1)
        with torch.enable_grad():
            gain = F.cross_entropy(network(x + delta), predicted) - penalty * delta.square().sum()
            (gradient,) = torch.autograd.grad(gain, delta)
        delta = (delta + learning_rate * gradient).detach()
    assert delta is not None, "no batch"
    return delta
