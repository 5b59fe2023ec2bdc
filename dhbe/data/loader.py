"""Training batches: shuffled, cropped and mirrored as whole-batch tensor operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from dhbe.core.rng import generator
from dhbe.core.types import CLEAN, Batch, DataSpec
from dhbe.data.images import ImageSet

Compose = Callable[[Tensor, Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor, Tensor]]
"""(images, labels, positions, generator) -> (images, labels, poison indicator) of a batch."""


def to_float(images: Tensor) -> Tensor:
    """Images (B, C, H, W): uint8 -> float32 in [0, 1], channels last in memory.

    Floats are in [0, 1] already and keep their values.
    """
    images = images.contiguous(memory_format=torch.channels_last)
    return images if images.is_floating_point() else images.float().div_(255)


CROPPED, TURNED = 0.8, 0.25
"""Share of images that ``crop_flip_rotate`` crops and turns (official: of whole batches 0.8 and
0.5, and half of the images in the latter)."""


def augmented(images: Tensor, spec: DataSpec, rng: torch.Generator) -> Tensor:
    """Images (B, C, H, W) as ``spec.augmentation`` says; floats where it rotates."""
    if spec.augmentation == "none":
        return images
    if spec.augmentation == "crop_flip":
        return augment(images, padding=spec.crop_padding, flip=spec.flip, rng=rng)
    padding = round(5 * spec.image_size / 32)
    moved = augment(images, padding=padding, flip=spec.flip, rng=rng, share=CROPPED)
    drawn, chosen = (torch.rand(len(images), generator=rng, device=images.device) for _ in range(2))
    angle = torch.where(chosen < TURNED, (2 * drawn - 1) * math.radians(10), 0)
    return rotate(to_float(moved), angle)


def rotate(images: Tensor, angle: Tensor) -> Tensor:
    """Square images (B, C, H, H) turned about their centre, bilinearly; what comes in is 0.

    Args:
        angle: in radians (B,); where it is 0 an image stays exactly as it is.
    """
    angle = angle.to(images)
    rows = [torch.stack(r, 1) for r in ((angle.cos(), -angle.sin()), (angle.sin(), angle.cos()))]
    turn = F.pad(torch.stack(rows, 1), (0, 1))
    grid = F.affine_grid(turn, list(images.shape), align_corners=True)
    turned = F.grid_sample(images, grid, align_corners=True)
    return torch.where((angle != 0)[:, None, None, None], turned, images)


def augment(
    images: Tensor, *, padding: int, flip: bool, rng: torch.Generator, share: float = 1.0
) -> Tensor:
    """Zero-padded random crop and random mirror, drawn for each image, in two gathers.

    Args:
        images: (B, C, H, W), any dtype.
        padding: pixels added on each side before the crop.
        rng: generator on the images' device.
        share: of the images that are cropped.
    """
    if not padding and not flip:
        return images
    b, c, h, w = images.shape
    device = images.device

    kept = None if share == 1 else torch.rand((b, 1), generator=rng, device=device) >= share

    def offsets() -> Tensor:
        drawn = torch.randint(2 * padding + 1, (b, 1), generator=rng, device=device)
        return drawn if kept is None else drawn.masked_fill(kept, padding)

    rows = offsets() + torch.arange(h, device=device)  # (B, H)
    columns = torch.arange(w, device=device).expand(b, w)
    if flip:
        mirrored = torch.rand((b, 1), generator=rng, device=device) < 0.5
        columns = torch.where(mirrored, w - 1 - columns, columns)
    columns = columns + offsets()  # (B, W)
    padded = F.pad(images, (padding,) * 4)
    pick_b = torch.arange(b, device=device)[:, None, None, None]
    pick_c = torch.arange(c, device=device)[None, :, None, None]
    return padded[pick_b, pick_c, rows[:, None, :, None], columns[:, None, None, :]]


def even(images: int, batch_size: int) -> int:
    """Size of as many equal batches as ``batch_size`` would make, the ragged last one included.

    For a handful of images, of which a dropped batch would be a good part: 4 x 125 of 500 and 128.
    """
    return images // math.ceil(images / batch_size)


class TrainingBatches:
    """Batches of one training set; each epoch's order and augmentation depend on (seed, epoch).

    No state passes from one epoch to the next, so a training that resumes at an epoch boundary
    sees exactly what an uninterrupted one sees.

    Args:
        images: the (poisoned) training set of N images, with the labels to train on.
        indicator: what was done to each image (N,); default: nothing.
        spec: says how to augment.
        dtype: of the images that a batch holds.
        steps: batches per epoch, drawn with replacement (ANP, NFT, FIP); None: each image once.
        compose: makes each batch what it is, before augmentation; the generator is the epoch's.
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        spec: DataSpec,
        batch_size: int,
        seed: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        indicator: Tensor | None = None,
        compose: Compose | None = None,
        steps: int | None = None,
    ) -> None:
        self.images, self.spec, self.compose = images.to(device), spec, compose
        self.device, self.dtype = device, dtype
        self.batch_size = batch_size if steps else min(batch_size, len(images))
        self.seed, self.steps = seed, steps
        self.labels = images.labels.to(device)
        unmarked = torch.full((len(images),), CLEAN, dtype=torch.int8)
        self.indicator = (unmarked if indicator is None else indicator).to(device)
        self.set_epoch(0)

    def __len__(self) -> int:
        """Batches per epoch; a ragged last one is dropped."""
        return self.steps or len(self.images) // self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields, and what its losses draw."""
        self.epoch = epoch
        self.noise = generator(self.seed, "noise", epoch, device=self.device)

    def __iter__(self) -> Iterator[Batch]:
        rng = generator(self.seed, "batches", self.epoch, device=self.device)
        total, count = len(self.images), len(self) * self.batch_size
        if self.steps:
            order = torch.randint(total, (count,), generator=rng, device=self.device)
        else:
            order = torch.randperm(total, generator=rng, device=self.device)[:count]
        for i, (raw, index) in enumerate(self.images.batches(order, self.batch_size)):
            progress = (self.epoch * len(self) + i + 1) / len(self)
            raw, index = raw.to(self.device), index.to(self.device)
            labels, indicator = self.labels[index], self.indicator[index]
            if self.compose is not None:
                raw, labels, indicator = self.compose(to_float(raw), labels, index, rng)
            x = to_float(augmented(raw, self.spec, rng)).to(self.dtype)
            yield Batch(x, labels, indicator, index, self.noise, progress)
