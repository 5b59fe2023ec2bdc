"""Records that cross module boundaries: frozen, keyword-only, free of behaviour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

Augmentation = Literal["none", "crop_flip", "crop_flip_rotate"]
"""What a training does to its images: nothing; the data set's random crop and mirror; the crop of
5 of 32 pixels, rotation by at most 10 degrees and mirror of the VinAI codes (WaNet and its kin)."""


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Public knowledge of a data set, shared with the defender.

    Attributes:
        mean, std: per-channel statistics of pixels in [0, 1]; the network's first layer.
        flip: whether a horizontal mirror keeps the label (not so for digits and some signs).
        crop_padding: pixels of zero padding for the random crop; 0 switches it off.
        balanced: whether all classes have the same number of training images.
        order: of the channels that the network takes; images are RGB everywhere, and ``mean`` and
            ``std`` are in this order.
        augmentation: of trainings; an attack's or a defense's recipe may ask for another one.
    """

    name: str
    classes: int
    channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    crop_padding: int
    balanced: bool
    order: Literal["rgb", "bgr"] = "rgb"
    augmentation: Augmentation = "crop_flip"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return (self.channels, self.image_size, self.image_size)


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """The defender's view of a victim: no attack and no test set inside."""

    network: nn.Module
    architecture: str
    spec: DataSpec


class Batch(NamedTuple):
    """Training batch, on the device and in the precision of the training.

    Attributes:
        images: (B, C, H, W) in [0, 1].
        labels, indicator, positions: (B,).
        rng: for what a loss draws beside the batch; fresh in every epoch.
        progress: epochs begun, this batch included (1.5: half of the second).
    """

    images: Tensor
    labels: Tensor
    indicator: Tensor
    positions: Tensor
    rng: torch.Generator
    progress: float

    def part(self, rows: slice) -> Batch:
        """Some rows of the batch."""
        return self._replace(
            images=self.images[rows],
            labels=self.labels[rows],
            indicator=self.indicator[rows],
            positions=self.positions[rows],
        )


CLEAN, POISON, COVER = 0, 1, 2
"""Codes of training images: untouched; trigger and goal label; trigger-like change, true label."""
