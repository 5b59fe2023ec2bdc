"""Where images come from: parquet tables, image folders, torchvision's own data sets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from dhbe.core.errors import DataError
from dhbe.core.folders import matching
from dhbe.data import tables
from dhbe.data.classes import SUFFIXES, class_list, labelled, lacking, numbered
from dhbe.data.images import ImageSet, Resident, image_bytes
from dhbe.data.reading import USUAL, Reading
from dhbe.data.survey import assembled

Part = Literal["train", "test"]


class Source(ABC):
    """One data set on disk."""

    @abstractmethod
    def load(
        self, part: Part, *, channels: int, size: int, stream: bool, reading: Reading = USUAL
    ) -> ImageSet:
        """Read the official training or test part.

        Args:
            channels, size: what the images are converted to.
            stream: decode on demand instead of now.
            reading: what the user says of files and labels, and which images are wanted.

        Raises:
            DataError: files are missing or unreadable; the message names the place and the remedy.
        """


class Parquet(Source):
    """Parquet tables with a column of images and one of labels.

    The layouts that Hugging Face ``datasets`` writes, and others; see ``dhbe.data.tables``.
    ``by_track`` groups the rows by the prefix of the file name before its last ``_`` (GTSRB: 30
    video frames of one physical sign). ``class_list`` is a file in ``root`` that names the classes
    in order, if it is there and labels are texts. ``content`` is the fingerprint of a user's
    tables, which makes other images another config.
    """

    def __init__(
        self,
        *,
        root: str,
        train: str,
        test: str,
        by_track: bool = False,
        class_list: str = "classes.txt",
        content: str = "",
    ) -> None:
        del content
        self.root, self.patterns, self.by_track = root, {"train": train, "test": test}, by_track
        self.class_list = class_list

    def files(self, part: str) -> list[Path]:
        """Tables of this part, in name order; empty if there are none."""
        return matching(Path(self.root).expanduser(), self.patterns[part])

    def load(
        self, part: Part, *, channels: int, size: int, stream: bool, reading: Reading = USUAL
    ) -> ImageSet:
        found = self.files(part)
        if not found:
            raise DataError(
                f"paths.data={self.root}: no file matches {self.patterns[part]!r}; put the tables "
                "there or set DHBE_DATA (or paths.data=) to the folder that holds them"
            )
        shared = {f.resolve() for f in self.files("train")} & {
            f.resolve() for f in self.files("test")
        }
        if shared:
            raise DataError(
                f"{min(shared)}: both in data.source.train={self.patterns['train']} and in "
                f"data.source.test={self.patterns['test']}; no image may be in both"
            )
        label = f"{found[0].parent}/{self.patterns[part]}"
        table, numbers = self._numbered(part, reading)
        if not table.labels:
            raise DataError(f"{label}: tables without rows; write them anew")
        labels = [numbers[x] for x in table.labels] if numbers else table.labels
        images = assembled(
            partial(table.encoded, table=label),
            labels,
            channels=channels,
            size=size,
            stream=stream,
            groups=_tracks(table.paths.to_pylist()) if self.by_track else None,
            how=reading.pixels,
            keep=reading.keep,
        )
        names = {number: name for name, number in numbers.items()}
        notes = lacking(label, set(labels), range(reading.classes or 0), names)
        images.notes = (*_columns(table, reading), *notes, *images.notes)
        return images

    def _numbered(self, part: Part, reading: Reading) -> tuple[tables.Table, dict[str, int]]:
        """The rows of a part, and the classes of labels that are texts; none for numbers.

        Raises:
            DataError: the parts name their classes differently.
        """
        read = partial(tables.read, image=reading.image_column, label=reading.label_column)
        table = read(self.files(part))
        listed = reading.class_names
        if not table.texts and table.names is None:
            if listed is not None:
                raise DataError(
                    f"data.class_names={listed}: expected null, because the labels of "
                    f"{self.root}/{self.patterns[part]} are numbers that bear no names"
                )
            return table, {}
        paths = {p: self.files(p) for p in self.patterns if p != part}
        others = {p: read(files, pixels=False) for p, files in paths.items() if files}
        for other in others.values():
            tables.agree(table, other)
        if not table.texts and listed is None:
            _same_numbers(table)
            return table, {}
        parts = {p: t.named() for p, t in ({part: table} | others).items()}
        file = Path(self.root).expanduser() / self.class_list
        names = {f"{self.root}/{self.patterns[p]}": t.labels for p, t in parts.items()}
        in_order = class_list(listed, [file], reading.classes)
        return parts[part], numbered(names, classes=reading.classes, listed=in_order, what="label")


def _same_numbers(table: tables.Table) -> None:
    """Refuse numbers whose names are other numbers, as of folders that were sorted as texts."""
    named = [n for n in table.names or () if n.isascii() and n.isdecimal()]
    wrong = [(i, n) for i, n in enumerate(table.names or ()) if n in named and int(n) != i]
    if wrong and len(named) == len(table.names or ()):
        number, name = wrong[0]
        raise DataError(
            f"{table.folders[0]}: the table says that label {number} is class {name!r}; which "
            "number is meant? Say data.class_names=[...], all names in the order that you want"
        )


def _columns(table: tables.Table, reading: Reading) -> Iterator[str]:
    image, label = table.columns
    found = reading.image_column is None or reading.label_column is None
    if found and (image, label) != ("image", "label"):
        yield (
            f"images are read from column {image}, labels from {label}; data.image_column= and "
            "data.label_column= name others"
        )


def _tracks(names: Iterable[str]) -> torch.Tensor:
    prefixes = [n.rsplit("_", 1)[0] for n in names]
    return torch.from_numpy(np.unique(prefixes, return_inverse=True)[1].astype(np.int64))


class Folder(Source):
    """``root/<part>/<class name>/<image>``; ``dhbe.data.classes`` numbers the classes.

    ``class_list`` is a file in ``root`` or in a part that names all classes in order, if it is
    there. ``content`` is the fingerprint of the images, which makes others another config.
    """

    def __init__(
        self,
        *,
        root: str,
        train: str,
        test: str,
        class_list: str = "classes.txt",
        content: str = "",
    ) -> None:
        del content
        self.root, self.parts = root, {"train": train, "test": test}
        self.class_list = class_list

    def load(
        self, part: Part, *, channels: int, size: int, stream: bool, reading: Reading = USUAL
    ) -> ImageSet:
        root = Path(self.root).expanduser()
        folders = {str(root / name): root / name for name in self.parts.values()}
        lists = [folder / self.class_list for folder in (root, *folders.values())]
        listed = class_list(reading.class_names, lists, reading.classes)
        top = str(root / self.parts[part])
        found, notes = labelled(folders, classes=reading.classes, listed=listed, only=top)
        files = found[top]
        if not files:
            raise DataError(
                f"{top}: no images; expected {top}/<class name>/<image file> "
                f"({', '.join(sorted(SUFFIXES))}); set data.source.root"
            )

        def encoded(position: int) -> tuple[str, bytes]:
            file = files[position][0]
            return str(file), image_bytes(file)

        images = assembled(
            encoded,
            [label for _, label in files],
            channels=channels,
            size=size,
            stream=stream,
            how=reading.pixels,
            keep=reading.keep,
        )
        if len({folder.resolve() for folder in folders.values()}) < len(self.parts):
            notes.append("train and test are one folder, so that accuracies are those of training")
        images.notes = (*notes, *images.notes)
        return images


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

    def load(
        self, part: Part, *, channels: int, size: int, stream: bool, reading: Reading = USUAL
    ) -> ImageSet:
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
        labels = torch.tensor([y for _, y in pairs])
        return Resident(images.contiguous(), labels).subset(reading.keep(labels))


def _resized(images: torch.Tensor, channels: int, size: int) -> torch.Tensor:
    from torchvision.transforms.v2 import functional as tv

    images = tv.grayscale_to_rgb(images) if channels == 3 else tv.rgb_to_grayscale(images)
    resized: torch.Tensor = tv.resize(images, [size, size], antialias=True)
    return resized


class FirstFound(Source):
    """The first of several sources that is present: parquet tables, else torchvision's files."""

    def __init__(self, *, parquet: Parquet, otherwise: Source) -> None:
        self.parquet, self.otherwise = parquet, otherwise

    def load(
        self, part: Part, *, channels: int, size: int, stream: bool, reading: Reading = USUAL
    ) -> ImageSet:
        source = self.parquet if self.parquet.files(part) else self.otherwise
        return source.load(part, channels=channels, size=size, stream=stream, reading=reading)
