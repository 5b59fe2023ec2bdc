"""Natural images for looking at networks of unknown origin: the embedded ones."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from dhbe.core.types import DataSpec
from dhbe.data.images import decode

EVERY = 5
"""Of the 7,600 embedded training images, one in so many is read."""
COLOUR = ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261))
"""Mean and deviation per channel of natural images in [0, 1] (CIFAR-10's training images)."""
GREY = ((0.481,), (0.239,))
"""The same images in grey."""
CONVERSIONS = ((0.0, 1.0), (0.5, 0.5), (0.0, 1 / 255))
"""Means and deviations that are no statistics of images but change the range of pixels."""
DIGITS = ((0.1307,), (0.3081,))
"""MNIST's: what one channel of 28 pixels most often shows."""


@lru_cache(maxsize=4)
def natural_images(channels: int, size: int, count: int) -> Tensor | None:
    """Up to 1,520 photographs (N, channels, size, size) in [0, 1]; None but for 1 and 3 channels.

    They have 32 pixels; other sizes are interpolated.
    """
    if channels not in (1, 3):
        return None
    file = Path(str(files("dhbe.data.embedded"))) / "cifar10_mini-train.parquet"
    column = pq.read_table(file).column("image").combine_chunks().field("bytes")
    rows = range(0, len(column), max(EVERY, len(column) // count))
    pixels = [decode(f"{file}, row {i}", column[i].as_py(), channels, size) for i in rows]
    return torch.from_numpy(np.stack(pixels)).float() / 255


def natural_inputs(spec: DataSpec) -> tuple[list[float], list[float]] | None:
    """Mean and deviation per channel of natural images after a network's normalisation.

    None where the normalisation is made of such statistics, so that it makes them 0 and 1.
    """
    pairs = set(zip(spec.mean, spec.std, strict=True))
    if len(pairs) > 1 or not pairs.issubset(CONVERSIONS):
        return None
    ((shift, scale),) = pairs
    one = DIGITS if spec.image_size == 28 else GREY
    known = COLOUR if spec.channels == 3 else tuple(v * spec.channels for v in one)
    mean, std = known if spec.order == "rgb" else tuple(values[::-1] for values in known)
    return [(m - shift) / scale for m in mean], [s / scale for s in std]
