"""The image generator (DHBE's GeneratorB): noise -> batch of images in normalised space."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def initial_size(size: int, bases: tuple[int, ...]) -> tuple[int, int]:
    """(base, doublings) with ``size == base * 2**doublings``; the smallest number of doublings.

    Raises:
        ValueError: ``size`` is no base times a power of two.
    """
    for doublings in range(6):
        base, rest = divmod(size, 2**doublings)
        if not rest and base in bases:
            return base, doublings
    raise ValueError(f"size {size}: expected one of {bases} times a power of two")


class UpConv(nn.Conv2d):
    """Nearest-neighbour upsampling x2, then a 3x3 convolution, in one step.

    Each output pixel sees only 2x2 different input pixels, so both together are a transposed 4x4
    convolution of stride 2 whose kernel holds sums of the 3x3 weights: the same result with 16
    instead of 36 products per input pixel.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Features (B, C_in, H, W) -> (B, C_out, 2H, 2W)."""
        w = self.weight.flip(2, 3)
        shifts = itertools.product(((0, 1), (1, 0)), repeat=2)
        kernel = torch.stack([F.pad(w, columns + rows) for rows, columns in shifts]).sum(dim=0)
        return F.conv_transpose2d(input, kernel.transpose(0, 1), self.bias, stride=2, padding=1)


def up_block(width_in: int, width: int) -> nn.Sequential:
    """Upsampling x2, 3x3 convolution, BatchNorm, LeakyReLU(0.2)."""
    return nn.Sequential(
        UpConv(width_in, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.LeakyReLU(0.2, inplace=True),
    )


class Upsampler(nn.Module):
    """Linear - BN - (upsample x2 - conv - BN - LeakyReLU)* - ``exit``: noise -> images.

    Args:
        latent: length of the noise vector.
        width: channels of the last hidden layer; the others have twice as many.
        size: pixels of the output, a base times a power of two.
        exit: maps (B, width, size, size) to the images.
    """

    def __init__(
        self, *, latent: int, width: int, size: int, bases: tuple[int, ...], exit: nn.Module
    ) -> None:
        super().__init__()
        self.latent = latent
        self.base, doublings = initial_size(size, bases)
        widths = [2 * width] * doublings + [width]
        self.project = nn.Linear(latent, widths[0] * self.base**2)
        self.entry = nn.BatchNorm2d(widths[0])
        self.blocks = nn.ModuleList(up_block(a, b) for a, b in itertools.pairwise(widths))
        self.exit = exit

    def forward(self, z: Tensor) -> Tensor:
        """Noise (B, latent) -> images (B, C, size, size)."""
        x = self.project(z).unflatten(1, (-1, self.base, self.base))
        x = self.entry(x.contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            x = block(x)
        images: Tensor = self.exit(x)
        return images


class Rescale(nn.Module):
    """Images of mean 0 and deviation 1 per channel -> of the given ones."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) of mean 0 and deviation 1 -> of the given ones, per channel."""
        return x * self.std + self.mean


class ImageGenerator(Upsampler):
    """Noise -> images in *normalised* space; the exit is conv - tanh - BN without affine.

    That last BatchNorm gives every generated batch zero mean and unit variance per channel, the
    statistics of normalised data: the only restriction on the range of the images.

    Args:
        channels: channels of the images.
        image_size: pixels; 5, 6, 7 or 8 times a power of two up to 32.
        statistics: mean and deviation per channel that the images shall have instead, for networks
            whose normalisation does not make them 0 and 1 (ours: the paper's all do).
    """

    BASES = (5, 6, 7, 8)

    def __init__(
        self,
        *,
        latent: int,
        width: int,
        channels: int,
        image_size: int,
        statistics: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> None:
        exit = nn.Sequential(
            nn.Conv2d(width, channels, 3, padding=1),
            nn.Tanh(),
            nn.BatchNorm2d(channels, affine=False),
        )
        if statistics is not None:
            exit.append(Rescale(*statistics))
        super().__init__(latent=latent, width=width, size=image_size, bases=self.BASES, exit=exit)
