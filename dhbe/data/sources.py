"""Where images come from: parquet tables, image folders, torchvision's own data sets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dhbe.core.errors import DataError
from dhbe.data.images import Encoded, ImageSet, Resident, Streamed, in_memory

Part = Literal["train", "test"]
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"}


class Source(ABC):
    """One data set on disk."""

    @abstractmethod
    def load(self, part: Part, *, channels: int, size: int, stream: bool) -> ImageSet:
        """Read the official training or test part.

        Args:
            channels, size: what the images are converted to.
            stream: decode on demand instead of now.

        Raises:
            DataError: files are missing or unreadable; the message names the place and the remedy.
        """


def _assemble(
    encoded: Encoded,
    labels: Sequence[int],
    *,
    channels: int,
    size: int,
    stream: bool,
    groups: torch.Tensor | None = None,
) -> ImageSet:
    if stream:
        targets = torch.as_tensor(labels, dtype=torch.int64)
        return Streamed(encoded, targets, channels=channels, size=size, groups=groups)
    return in_memory(encoded, labels, channels=channels, size=size, groups=groups)


class Parquet(Source):
    """Parquet tables with columns ``image: struct<bytes, path>`` and ``label: int64``.

    The layout that Hugging Face ``datasets`` writes. ``by_track`` groups the rows by the prefix of
    the file name before its last ``_`` (GTSRB: 30 video frames of one physical sign). ``content``
    is the fingerprint of a user's tables, which makes other images another config.
    """

    def __init__(
        self, *, root: str, train: str, test: str, by_track: bool = False, content: str = ""
    ) -> None:
        del content
        self.root, self.patterns, self.by_track = root, {"train": train, "test": test}, by_track

    def files(self, part: Part) -> list[Path]:
        """Tables of this part, in name order; empty if there are none."""
        return sorted(Path(self.root).glob(self.patterns[part]))

    def load(self, part: Part, *, channels: int, size: int, stream: bool) -> ImageSet:
        found = self.files(part)
        if not found:
            raise DataError(
                f"paths.data={self.root}: no file matches {self.patterns[part]!r}; put the tables "
                "there or set DHBE_DATA (or paths.data=) to the folder that holds them"
            )
        table = pa.concat_tables([_read(f) for f in found])
        images = table.column("image").combine_chunks()
        blobs, names = images.field("bytes"), images.field("path")
        label = f"{found[0].parent}/{self.patterns[part]}"

        def encoded(position: int) -> tuple[str, bytes]:
            name = f"{label}, row {position} ({names[position].as_py()})"
            return name, blobs[position].as_py() or b""

        groups = _tracks(names.to_pylist()) if self.by_track else None
        labels = table.column("label").to_pylist()
        return _assemble(
            encoded, labels, channels=channels, size=size, stream=stream, groups=groups
        )


def _read(file: Path) -> pa.Table:
    try:
        table = pq.read_table(file, columns=["image", "label"])
        images, labels = (table.column(c).combine_chunks() for c in ("image", "label"))
        images.field("bytes")
        images.field("path").to_pylist()  # a name that is no text fails here, not in a message
        if labels.null_count or not pa.types.is_integer(labels.type):
            raise ValueError("labels that are not whole numbers")
        return table
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: not a readable image table ({error}); fetch it anew") from error


def _tracks(names: Iterable[str]) -> torch.Tensor:
    prefixes = [n.rsplit("_", 1)[0] for n in names]
    return torch.from_numpy(np.unique(prefixes, return_inverse=True)[1].astype(np.int64))


class Folder(Source):
    """``root/<part>/<class name>/<image>``; classes are numbered in sorted order of the names.

    ``content`` is the fingerprint of the images, which makes others another config.
    """

    def __init__(self, *, root: str, train: str, test: str, content: str = "") -> None:
        del content
        self.root, self.parts = root, {"train": train, "test": test}

    def load(self, part: Part, *, channels: int, size: int, stream: bool) -> ImageSet:
        top = Path(self.root) / self.parts[part]
        classes = sorted(p for p in top.glob("*") if p.is_dir())
        files = [(f, i) for i, c in enumerate(classes) for f in sorted(c.rglob("*"))]
        files = [(f, i) for f, i in files if f.suffix.lower() in SUFFIXES]
        if not files:
            raise DataError(
                f"{top}: no images; expected {top}/<class name>/<image file> "
                f"({', '.join(sorted(SUFFIXES))}); set data.source.root"
            )

        def encoded(position: int) -> tuple[str, bytes]:
            file = files[position][0]
            return str(file), file.read_bytes()

        labels = [i for _, i in files]
        return _assemble(encoded, labels, channels=channels, size=size, stream=stream)


class Torchvision(Source):
    """A data set that torchvision reads, and downloads when ``download`` is set.

    ``train`` and ``test`` are the arguments of ``torchvision.datasets.<dataset>`` for each part.
    """

    def __init__(
        self,
        *,
        dataset: str,
        root: str,
        download: bool,
        train: dict[str, Any],
        test: dict[str, Any],
    ) -> None:
        self.dataset, self.root, self.download = dataset, root, download
        self.arguments = {"train": train, "test": test}

    def load(self, part: Part, *, channels: int, size: int, stream: bool) -> ImageSet:
        from torchvision import datasets

        try:
            found = getattr(datasets, self.dataset)(
                root=self.root, download=self.download, **self.arguments[part]
            )
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"paths.data={self.root}: {self.dataset} is not there ({error}); fetch it with "
                "data.source.otherwise.download=true or set DHBE_DATA (or paths.data=)"
            ) from error
        pairs = [(np.asarray(image), int(label)) for image, label in found]
        images = torch.from_numpy(np.stack([p for p, _ in pairs]))
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
        if images.shape[1:] != (channels, size, size):
            images = _resized(images, channels, size)
        return Resident(images.contiguous(), torch.tensor([y for _, y in pairs]))


def _resized(images: torch.Tensor, channels: int, size: int) -> torch.Tensor:
    from torchvision.transforms.v2 import functional as tv

    images = tv.grayscale_to_rgb(images) if channels == 3 else tv.rgb_to_grayscale(images)
    resized: torch.Tensor = tv.resize(images, [size, size], antialias=True)
    return resized


class FirstFound(Source):
    """The first of several sources that is present: parquet tables, else torchvision's files."""

    def __init__(self, *, parquet: Parquet, otherwise: Source) -> None:
        self.parquet, self.otherwise = parquet, otherwise

    def load(self, part: Part, *, channels: int, size: int, stream: bool) -> ImageSet:
        source = self.parquet if self.parquet.files(part) else self.otherwise
        return source.load(part, channels=channels, size=size, stream=stream)
