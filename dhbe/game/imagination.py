"""Imagined data: images that a network's own BatchNorm statistics describe, from dead leaves.

Dead leaves (Lee et al., IJCV 2001) are overlapping random shapes with the statistics of natural
images; learning from such images goes far (Baradad et al., NeurIPS 2021). From there, gradient
steps on the pixels bring each batch to the statistics that the training data left in the network's
BatchNorms (DeepInversion, Yin et al., CVPR 2020) and to all classes alike. Unlike DeepInversion,
no image is pulled towards a label: the shortest way to a backdoor's target class is its trigger.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from dhbe.game.statistics import statistics_gaps
from dhbe.methods.losses import imbalance
from dhbe.models import Normalized
from dhbe.training.parallel import Processes

SHAPES = 40
"""Leaves per image."""
RADII = 2.5 / 32, 14 / 32
"""Smallest and largest radius, in widths of the image; their density falls with the cube."""
EDGE = 0.01
"""Pixels stay this far from 0 and 1, where a logit would be infinite."""


@dataclass(frozen=True, kw_only=True)
class Imagination:
    """How the imagined set is made."""

    images: Annotated[int, Ge(0)]
    """Size of the set; 0 plays without one."""
    batch_size: Annotated[int, Ge(2)]
    """Images whose statistics are matched together."""
    steps: Annotated[int, Ge(0)]
    """Gradient steps per batch; 0 leaves dead leaves as they are."""
    learning_rate: Annotated[float, Gt(0)]
    """Of Adam over the pixels' logits; halfway it begins to fall to 5 %."""
    balance: Annotated[float, Ge(0)]
    """Weight of the divergence of the batch's mean prediction from even classes."""
    shift: Annotated[int, Ge(0)]
    """Largest shift of a batch, in pixels, before the network sees it."""


def dead_leaves(count: int, shape: tuple[int, int, int], rng: torch.Generator) -> Tensor:
    """Images (count, C, H, W) in [EDGE, 1 - EDGE] of ``SHAPES`` shaded, textured, tilted leaves.

    Args:
        shape: of an image, (C, H, W), H = W.
        rng: generator on the CPU.
    """
    channels, size, _ = shape
    line = (torch.arange(size) + 0.5) / size
    rows, columns = torch.meshgrid(line, line, indexing="ij")

    def uniform(*dims: int) -> Tensor:
        return torch.rand((count, *dims), generator=rng)

    def paint(low: float, high: float) -> Tensor:
        grey = low + (high - low) * uniform(1, 1, 1)
        tint = 0.12 * torch.randn((count, channels, 1, 1), generator=rng)
        down, right = 0.15 * torch.randn((2, count, 1, 1, 1), generator=rng)
        return grey + tint + down * (rows - 0.5) + right * (columns - 0.5)

    images = paint(0.1, 0.9)
    small, large = RADII
    for _ in range(SHAPES):
        radius = small / (1 - uniform(1, 1) * (1 - (small / large) ** 2)).sqrt()
        x, y = columns - uniform(1, 1), rows - uniform(1, 1)
        angle, ratio = math.pi * uniform(1, 1), 0.3 + 0.7 * uniform(1, 1)
        along = (x * angle.cos() + y * angle.sin()) / radius
        across = (y * angle.cos() - x * angle.sin()) / (radius * ratio)
        power = 2.0 + 4.0 * (uniform(1, 1) < 0.5)  # ellipses and rounded boxes
        inside = torch.sigmoid(6 * (1 - along.abs() ** power - across.abs() ** power))[:, None]
        grain = 0.03 * torch.randn((count, *shape), generator=rng)
        images = images * (1 - inside) + inside * (paint(0, 1) + grain)
    clipped: Tensor = images.clamp(EDGE, 1 - EDGE)
    return clipped


def invert(
    network: Normalized,
    images: Tensor,
    options: Imagination,
    rng: torch.Generator,
    autocast: torch.autocast,
) -> Tensor:
    """One batch (B, C, H, W) in (0, 1) after gradient steps on the logits of its pixels.

    Args:
        network: frozen, in eval mode.
        rng: generator on the CPU.
    """
    logits = torch.logit(images).requires_grad_(True)
    adam = torch.optim.Adam([logits], lr=options.learning_rate, betas=(0.5, 0.9))
    for step in range(options.steps):
        left = min(1.0, 2 * (1 - step / options.steps) + 0.05)
        adam.param_groups[0]["lr"] = options.learning_rate * left
        x = moved(torch.sigmoid(logits), options.shift, rng)
        with autocast, statistics_gaps(network, Processes()) as gaps:
            seen = network(x.contiguous(memory_format=torch.channels_last))
        loss = options.balance * imbalance(seen.double().softmax(dim=1).mean(dim=0))
        if gaps:
            loss = loss + torch.stack(gaps).mean()
        (logits.grad,) = torch.autograd.grad(loss, logits)
        adam.step()
    return torch.sigmoid(logits).detach()


def moved(x: Tensor, shift: int, rng: torch.Generator) -> Tensor:
    """A batch shifted around its edges, and mirrored half of the time."""
    down, right = torch.randint(-shift, shift + 1, (2,), generator=rng).tolist()
    x = x.roll((down, right), dims=(2, 3))
    return x.flip(3) if torch.rand((), generator=rng) < 0.5 else x


def imagine(
    network: Normalized, options: Imagination, rng: torch.Generator, autocast: torch.autocast
) -> Tensor:
    """Normalised images (images, C, H, W).

    Args:
        network: in eval mode.
        rng: generator on the CPU.
    """
    network.eval()
    leaves = dead_leaves(options.images, network.spec.shape, rng).to(network.mean)
    batches = leaves.tensor_split(max(1, options.images // options.batch_size))
    made = [invert(network, batch, options, rng, autocast) for batch in batches]
    return network.normalize(torch.cat(made))
