"""Image sets: uint8 images with labels, in memory or read on demand by worker processes."""

from __future__ import annotations

import hashlib
import io
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dhbe.core.errors import DataError
from dhbe.data.pixels import AS_USUAL, Pixels, Say, unsaid

MAX_PIXELS = 64_000_000
"""Of one image, checked before it is unpacked."""
MAX_FILE = 256 * 2**20
"""Bytes of one image file."""
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "PPM", "TIFF")
"""No other decoder is tried, whatever a file says it is: EPS, for one, is run as a program."""
Encoded = Callable[[int], tuple[str, bytes]]
"""Position -> (name to show in messages, encoded image file)."""


def image_bytes(file: Path, key: str = "") -> bytes:
    """What an image file holds.

    Args:
        key: of the config that names the file, for messages.

    Raises:
        DataError: it is no file, cannot be read, or is too large to be an image.
    """
    name = f"{key}={file}" if key else str(file)
    try:
        about = file.stat()
        if stat.S_ISDIR(about.st_mode):
            raise DataError(f"{name}: a folder, not an image file; rename or move it")
        if not stat.S_ISREG(about.st_mode):
            raise DataError(f"{name}: a device or pipe, not an image file; delete it")
        if about.st_size > MAX_FILE:
            raise DataError(f"{name}: more than {MAX_FILE:,} bytes, not a readable image")
        return file.read_bytes()
    except ValueError as error:  # a null byte, in a table
        raise DataError(f"{name!r}: not the name of a file ({error})") from error
    except OSError as error:
        if file.is_symlink():
            raise DataError(
                f"{name}: a link to {os.readlink(file)}, which cannot be read ({error.strerror}); "
                "mend or delete the link"
            ) from error
        raise DataError(f"{name}: cannot be read ({error.strerror})") from error


def unpack(
    name: str, blob: bytes, mode: str, how: Pixels = AS_USUAL, say: Say = unsaid
) -> Image.Image:
    """Encoded image -> Pillow image in ``mode``: L or RGB, LA or RGBA with transparency.

    Args:
        say: takes remarks on what was done to the image.

    Raises:
        DataError: the bytes are not a readable image.
    """
    try:
        with Image.open(io.BytesIO(blob), formats=FORMATS) as opened:
            if getattr(opened, "is_animated", False):
                if opened.format != "MPO":
                    raise ValueError("animated; which frame is meant?")
                say("with further pictures in the same JPEG file (MPO); the first is read")
            if opened.width * opened.height > MAX_PIXELS:
                raise ValueError(f"{opened.width} x {opened.height} pixels, at most {MAX_PIXELS:,}")
            return how(opened, mode, say)
    except UnidentifiedImageError as error:
        what = f"none of {', '.join(FORMATS)}" if blob else "empty"
        raise DataError(f"{name}: not a readable image ({what}); replace or delete it") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{name}: not a readable image ({error}); replace or delete it") from error


def mode_of(channels: int, name: str) -> str:
    """Pillow's name of so many channels.

    Raises:
        DataError: no image file has so many.
    """
    modes = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
    if channels not in modes:
        raise DataError(f"{name}: an image file has 1 to 4 channels, the network takes {channels}")
    return modes[channels]


def decode(
    name: str,
    blob: bytes,
    channels: int,
    size: int,
    how: Pixels = AS_USUAL,
    say: Say = unsaid,
) -> np.ndarray:
    """Encoded image -> uint8 (C, size, size); other sizes are resized bilinearly.

    Raises:
        DataError: the bytes are not a readable image.
    """
    image = unpack(name, blob, mode_of(channels, name), how, say)
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


class ImageSet(ABC):
    """Images (N, C, H, W) uint8 with labels (N,) int64; ``groups`` (N,) keeps relatives together.

    Groups name images of one physical object (GTSRB tracks): a split never separates them.
    """

    labels: Tensor
    groups: Tensor | None
    notes: tuple[str, ...] = ()
    """What a reader of the result has to know of how these images were read."""

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def subset(self, index: Tensor) -> ImageSet:
        """The images at positions ``index`` (M,), 0 to N - 1, in that order."""

    @abstractmethod
    def batches(self, order: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images uint8 (B, C, H, W), positions (B,)) in the given order of positions."""

    def to(self, device: torch.device) -> ImageSet:
        """The images where a training wants them; those that are streamed stay where they are."""
        del device
        return self

    def fingerprint(self, count: int = 64) -> str:
        """16 hex digits that depend on all labels and on ``count`` images spread over the set."""
        digest = hashlib.blake2b(self.labels.cpu().numpy().tobytes(), digest_size=8)
        index = torch.linspace(0, len(self) - 1, count).long()
        for images, _ in self.batches(index, count):
            digest.update(images.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def resident(self) -> Resident:
        """All images in memory."""
        parts = [x for x, _ in self.batches(torch.arange(len(self)), 512)]
        return Resident(torch.cat(parts), self.labels, self.groups)


class Resident(ImageSet):
    """All images in one uint8 tensor, on the device where the work is done."""

    def __init__(self, images: Tensor, labels: Tensor, groups: Tensor | None = None) -> None:
        assert images.dtype == torch.uint8
        assert images.ndim == 4
        assert len(images) == len(labels)
        self.images, self.labels, self.groups = images, labels, groups

    def subset(self, index: Tensor) -> Resident:
        index = index.to(self.images.device)
        groups = None if self.groups is None else self.groups[index]
        return Resident(self.images[index], self.labels[index], groups)

    def batches(self, order: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for index in order.to(self.images.device).split(batch_size):
            yield self.images[index], index

    def to(self, device: torch.device) -> Resident:
        """Copy on ``device`` (groups are only needed for splitting and stay behind)."""
        return Resident(self.images.to(device), self.labels.to(device))

    def resident(self) -> Resident:
        return self


class Streamed(ImageSet):
    """Images decoded on demand by DataLoader workers, for sets that memory cannot hold."""

    def __init__(
        self,
        encoded: Encoded,
        labels: Tensor,
        *,
        channels: int,
        size: int,
        positions: Tensor | None = None,
        groups: Tensor | None = None,
        workers: int = 2,
        how: Pixels = AS_USUAL,
    ) -> None:
        self.how = how
        self.encoded, self.labels, self.groups = encoded, labels, groups
        self.positions = torch.arange(len(labels)) if positions is None else positions
        self.channels, self.size, self.workers = channels, size, workers

    def subset(self, index: Tensor) -> Streamed:
        index = index.cpu()
        return Streamed(
            self.encoded,
            self.labels[index],
            channels=self.channels,
            size=self.size,
            positions=self.positions[index],
            groups=None if self.groups is None else self.groups[index],
            workers=self.workers,
            how=self.how,
        )

    def batches(self, order: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        chunks = [c.tolist() for c in order.cpu().split(batch_size)]
        decoded = DataLoader(
            _Decoded(self),
            batch_sampler=chunks,
            num_workers=self.workers if len(chunks) > 1 else 0,
        )
        for images, index in zip(decoded, chunks, strict=True):
            yield images, torch.tensor(index)


class _Decoded(Dataset[Tensor]):
    """Map-style view of a streamed set for the workers."""

    def __init__(self, source: Streamed) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Tensor:
        s = self.source
        name, blob = s.encoded(int(s.positions[index]))
        return torch.from_numpy(decode(name, blob, s.channels, s.size, s.how).copy())
