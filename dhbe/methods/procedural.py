"""Procedural images: dead leaves and coloured noise with the statistics of photographs.

Baradad et al., "Learning to See by Looking at Noise" (NeurIPS 2021), train on such images. Here
imagined images start from them: they have edges, occlusion, shading and texture, and no trigger.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

LEAVES = 24
"""Shapes per image, at most."""


def procedural(count: int, channels: int, size: int, rng: torch.Generator) -> Tensor:
    """Images (count, channels, size, size) in [0, 1], on the CPU: three of four are dead leaves."""
    leaves = dead_leaves(count * 3 // 4, size, rng)
    noise = coloured_noise(count - len(leaves), size, rng)
    x = torch.cat([leaves, noise + _palette(len(noise), 1, rng)[:, 0]])
    x = x.lerp(_blurred(x), torch.rand((count, 1, 1, 1), generator=rng))
    level = 0.47 + 0.12 * torch.randn((count, 1, 1, 1), generator=rng)
    contrast = 0.2 * (0.35 * torch.randn((count, 1, 1, 1), generator=rng)).exp()
    spread = x.std((1, 2, 3), keepdim=True).clamp_min(1e-3)
    x = (x - x.mean((1, 2, 3), keepdim=True)) / spread * contrast.clamp(0.05, 0.4) + level
    x = x.clamp(0, 1)[torch.randperm(count, generator=rng)]
    return x if channels == 3 else x.mean(1, keepdim=True).repeat(1, channels, 1, 1)


def coloured_noise(count: int, size: int, rng: torch.Generator) -> Tensor:
    """Zero-mean noise (count, 3, size, size) of amplitude 1 / f^a, a in 0.5..2.5 per image.

    The channels share most of their luminance, as those of photographs do.
    """
    y, x = torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)
    frequency = (y.square() + x.square()).sqrt().clamp_min(1 / size)
    exponent = 0.5 + 2 * torch.rand((count, 1, 1, 1), generator=rng)
    white = torch.randn((count, 3, size, size), generator=rng)
    noise = torch.fft.irfft2(torch.fft.rfft2(white) / frequency**exponent, s=(size, size))
    noise = noise - noise.mean((2, 3), keepdim=True)
    noise = noise / noise.std((2, 3), keepdim=True).clamp_min(1e-6)
    luminance = 0.2 + 0.1 * torch.rand((count, 1, 1), generator=rng)
    chroma = 0.04 * torch.randn((count, 3, 2), generator=rng)
    mixing = torch.cat([luminance.expand(-1, 3, -1), chroma], dim=2)
    strength = 0.3 + 0.9 * torch.rand((count, 1, 1, 1), generator=rng)
    return strength * torch.einsum("nij,njhw->nihw", mixing, noise)


def dead_leaves(count: int, size: int, rng: torch.Generator) -> Tensor:
    """Shaded and textured shapes that cover each other (count, 3, size, size), about [0, 1]."""
    line = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(line, line, indexing="ij")
    colours = _palette(count, LEAVES + 1, rng)
    slope = 0.15 * torch.randn((count, 2, 1, 1), generator=rng)
    texture = coloured_noise(count, size, rng)
    image = colours[:, 0] + slope[:, :1] * x + slope[:, 1:] * y + 0.2 * texture
    shapes = torch.randint(2, LEAVES + 1, (count, 1, 1, 1), generator=rng)
    for i in range(LEAVES):
        a, b, inside = _leaf(count, x, y, rng)
        slope = 0.15 * torch.randn((count, 2, 1, 1), generator=rng)
        texture = coloured_noise(count, size, rng) if i % 4 == 0 else texture.flip(2 + i % 2)
        grain = 0.4 * torch.rand((count, 1, 1, 1), generator=rng).square()
        fill = colours[:, i + 1] + slope[:, :1] * a + slope[:, 1:] * b + grain * texture
        image = image.lerp(fill, inside * (i < shapes))
    return image


def _leaf(count: int, x: Tensor, y: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates within one shape per image, and how far inside it each pixel is (0..1)."""

    def uniform() -> Tensor:
        return torch.rand((count, 1, 1, 1), generator=rng)

    radius = 0.08 / uniform().clamp_min(0.08) ** 0.8 * (1 + 2 * uniform())
    stretch, angle = torch.exp(0.6 * (2 * uniform() - 1)), math.pi * uniform()
    dx, dy = x - (2.4 * uniform() - 1.2), y - (2.4 * uniform() - 1.2)
    a = (dx * angle.cos() + dy * angle.sin()) / (radius * stretch)
    b = (dy * angle.cos() - dx * angle.sin()) / (radius / stretch)
    lobes = torch.randint(2, 6, (count, 1, 1, 1), generator=rng)
    waves = 1 + 0.25 * uniform() * torch.sin(torch.atan2(b, a) * lobes + 2 * math.pi * uniform())
    distance = torch.where(
        uniform() < 0.65, (a.square() + b.square()).sqrt() * waves, torch.maximum(a.abs(), b.abs())
    )
    inside = torch.sigmoid((1 - distance) * len(x) * radius.clamp_min(0.05))
    return a.clamp(-1, 1), b.clamp(-1, 1), inside


def _palette(count: int, colours: int, rng: torch.Generator) -> Tensor:
    """Colours (count, colours, 3, 1, 1) in [0, 1], related within an image."""
    base = 0.2 + 0.6 * torch.rand((count, 1, 1), generator=rng)
    tint = 0.06 * torch.randn((count, 1, 3), generator=rng)
    light = 0.25 * torch.randn((count, colours, 1), generator=rng)
    own = 0.05 * torch.randn((count, colours, 3), generator=rng)
    return (base + tint + light + own).clamp(0, 1)[..., None, None]


def _blurred(x: Tensor) -> Tensor:
    line = torch.tensor([0.25, 0.5, 0.25])
    kernel = (line[:, None] * line).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=x.shape[1])
