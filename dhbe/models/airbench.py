"""The network of cifar10-airbench (Jordan 2024, arXiv 2404.00498), made for short trainings."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge, Len
from torch import Tensor, nn

Widths = Annotated[list[Annotated[int, Ge(1)]], Len(3, 3)]
PATCH = 2
"""Side of the patches that the first layer whitens."""
EPS = 5e-4
"""Added to the variances of the patches (source: ``init_whiten``)."""


class _BatchNorm(nn.BatchNorm2d):
    """Scale fixed at 1 in training; statistics of the last few batches."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-12, momentum=0.4)
        self.weight.requires_grad_(False)


class _Conv(nn.Conv2d):
    """3x3 convolution that starts by passing its inputs through."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__(width_in, width, 3, padding=1, bias=False)

    def reset_parameters(self) -> None:
        """The first ``width_in`` filters are the identity."""
        super().reset_parameters()
        nn.init.dirac_(self.weight.data[: self.in_channels])


class _Head(nn.Linear):
    """Linear layer whose weights start at a deviation of 1; outputs are divided by its inputs."""

    def reset_parameters(self) -> None:
        """PyTorch's, scaled to a deviation of 1."""
        super().reset_parameters()
        self.weight.data /= self.weight.data.std()

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, width) -> logits (B, classes)."""
        return super().forward(features) / self.in_features


def _group(width_in: int, width: int) -> nn.Sequential:
    halves = (_Conv(width_in, width), nn.MaxPool2d(2), _BatchNorm(width), nn.GELU())
    return nn.Sequential(*halves, _Conv(width, width), _BatchNorm(width), nn.GELU())


class Airbench(nn.Module):
    """A whitening 2x2 convolution, three groups of two convolutions, a pool and a linear layer.

    Made for ``victim=airbench``. The scales of BatchNorm and the whitening filters are frozen, the
    latter at values that ``initialise_from`` finds in the training images.

    Args:
        widths: channels of the groups; 64, 256, 256 in the source.
        image_size: at least 9.
    """

    def __init__(self, *, widths: Widths, classes: int, channels: int, image_size: int) -> None:
        super().__init__()
        del image_size
        patch = channels * PATCH**2
        self.whiten = nn.Conv2d(channels, 2 * patch, PATCH)
        self.whiten.weight.requires_grad_(False)
        first, second, third = widths
        self.groups = nn.Sequential(
            nn.GELU(), _group(2 * patch, first), _group(first, second), _group(second, third)
        )
        self.pool = nn.AdaptiveMaxPool2d(1)  # of 3x3 pixels, where images have 32
        self.head = _Head(third, classes, bias=False)

    @torch.no_grad()
    def initialise_from(self, images: Tensor) -> None:
        """Set the first layer's filters: whitened principal patches and their negatives.

        Args:
            images: normalised, (N, C, H, W).
        """
        patches = nn.functional.unfold(images, PATCH).transpose(1, 2).flatten(0, 1)
        variances, directions = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (directions / (variances + EPS).sqrt()).T.unflatten(1, (-1, PATCH, PATCH))
        self.whiten.weight.copy_(torch.cat((filters, -filters)))

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (B, C, H, W) -> logits (B, classes)."""
        logits: Tensor = self.head(self.pool(self.groups(self.whiten(x))).flatten(1))
        return logits
