"""Ways of making trigger patterns that several attacks share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dhbe.data import ImageSet
from dhbe.models import Normalized
from dhbe.models.dataflow import classifier, features
from dhbe.models.hooks import frozen_statistics
from dhbe.training.runtime import Runtime


def optimize(
    start: Tensor,
    loss: Callable[[Tensor], Tensor],
    runtime: Runtime,
    *,
    steps: int,
    learning_rate: float,
) -> Tensor:
    """``start`` (any shape) after ``steps`` of Adam on ``loss``; detached, on the run's device."""
    latent = start.to(runtime.device, runtime.dtype, copy=True).requires_grad_(True)
    optimizer = torch.optim.Adam([latent], lr=learning_rate)
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            loss(latent).backward()
            optimizer.step()
    return latent.detach()


def selected_features(network: Normalized, x: Tensor, count: int) -> Tensor:
    """The ``count`` penultimate features with the largest weights, summed over classes (B, count).

    TrojanNN's choice of neurons (Liu et al., NDSS 2018).
    """
    weight = classifier(network).weight
    chosen = weight.abs().sum(dim=0).topk(min(count, weight.shape[1])).indices
    return features(network, x)[:, chosen]


def sample(train: ImageSet, count: int, rng: torch.Generator) -> ImageSet:
    """``count`` random training images."""
    return train.subset(torch.randperm(len(train), generator=rng)[:count])


def smooth(latent: Tensor, size: int) -> Tensor:
    """Band-limited picture (C, size, size): a small grid (C, k, k), enlarged bicubically."""
    return F.interpolate(latent[None], size=(size, size), mode="bicubic", align_corners=True)[0]


def min_max(x: Tensor) -> Tensor:
    """Shift and scale each image of (B, C, H, W), or one (C, H, W), to the range [0, 1]."""
    flat = x.flatten(-3)
    low, high = flat.amin(-1), flat.amax(-1)
    low, high = (v[..., None, None, None] for v in (low, high))
    return (x - low) / (high - low).clamp_min(1e-6)


def frozen_call(network: nn.Module, x: Tensor) -> Tensor:
    """Logits (B, K) of x (B, C, H, W), with gradients for ``x`` alone; statistics stay."""
    return frozen_statistics(network, x, {k: p.detach() for k, p in network.named_parameters()})
