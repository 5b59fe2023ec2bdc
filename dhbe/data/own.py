"""A user's own images for a network of unknown origin: folders of classes, or nothing at all."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Le

from dhbe.core.errors import DataError, got
from dhbe.core.types import DataSpec
from dhbe.data.images import ImageSet, Resident, decode, image_bytes
from dhbe.data.sources import SUFFIXES
from dhbe.data.splits import Data, Splits

NORMALIZATIONS: dict[str, tuple[list[float], list[float]]] = {
    "none": ([0.0], [1.0]),
    "half": ([0.5], [0.5]),
    "cifar10": ([0.4914, 0.4822, 0.4465], [0.247, 0.243, 0.261]),
    "pytorch_cifar": ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.201]),
    "cifar100": ([0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]),
    "gtsrb": ([0.0], [1.0]),
    "mnist": ([0.1307], [0.3081]),
    "tiny": ([0.4802, 0.4481, 0.3975], [0.2302, 0.2265, 0.2262]),
    "imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "bytes": ([0.0], [1 / 255]),
}
"""Mean and deviation of pixels in [0, 1]; one value serves all channels. ``gtsrb`` and ``tiny`` as
BackdoorBench sets them (its GTSRB networks take pixels as they are), ``pytorch_cifar`` as
kuangliu's pytorch-cifar and many after it, ``bytes`` for networks that take 0 to 255."""


class OwnImages(Data):
    """Images that the user has, if any: ``clean`` for the defender, ``test`` for measuring.

    Args:
        normalization: preset, or ``mean`` and ``std`` per channel.
        order: of the channels that the network takes; None is ``rgb``.
        clean: folder with one sub-folder per class; all of it goes to the defense.
        test: likewise; only the evaluation sees it.
        skip_unreadable: leave out corrupt, animated or huge images instead of stopping.
        content: fingerprint of both folders, which makes other images another config.

    Sub-folders whose names are numbers stand for these classes, others for classes in name order.
    """

    def __init__(
        self,
        *,
        name: str,
        classes: Annotated[int, Ge(2)],
        channels: Annotated[int, Ge(1)],
        image_size: Annotated[int, Ge(5), Le(2048)],
        normalization: str | dict[str, list[float]],
        order: Literal["rgb", "bgr"] | None,
        flip: bool,
        crop_padding: Annotated[int, Ge(0)],
        clean: str | None,
        test: str | None,
        skip_unreadable: bool,
        content: str = "",
    ) -> None:
        del content
        if order == "bgr" and channels != 3:
            raise got("data.order", order, f"rgb or null with data.channels={channels}")
        mean, std = statistics(normalization, channels)
        self.spec = DataSpec(
            name=name,
            classes=classes,
            channels=channels,
            image_size=image_size,
            mean=mean,
            std=std,
            flip=flip,
            crop_padding=crop_padding,
            balanced=False,
            order=order or "rgb",
        )
        self.folders = {"data.clean": clean, "data.test": test}
        self.skip_unreadable = skip_unreadable

    def load(self) -> Splits | None:
        """The images of both folders; None if neither is given.

        Raises:
            DataError: no image, an unreadable one, or folders that do not match the classes.
        """
        if not any(self.folders.values()):
            return None
        none = torch.empty(0, dtype=torch.int64)
        empty = Resident(torch.empty((0, *self.spec.shape), dtype=torch.uint8), none)
        skipped: list[str] = []
        clean, test = (
            self._read(key, Path(folder), skipped) if folder else empty
            for key, folder in self.folders.items()
        )
        pool = torch.arange(len(clean))
        return Splits(
            train=empty,
            pool=clean,
            test=test,
            train_index=none,
            pool_index=pool,
            skipped=tuple(skipped),
        )

    def _read(self, key: str, folder: Path, skipped: list[str]) -> ImageSet:
        images, labels = [], []
        for file, label in labelled(key, folder, self.spec.classes):
            try:
                pixels = decode(
                    str(file), image_bytes(file), self.spec.channels, self.spec.image_size
                )
            except DataError as error:
                if not self.skip_unreadable:
                    raise DataError(f"{error}; data.skip_unreadable=true leaves it out") from error
                skipped.append(str(file))
                continue
            images.append(torch.from_numpy(pixels.copy()))
            labels.append(label)
        if not images:
            raise DataError(f"{key}={folder}: no readable image in it")
        return Resident(torch.stack(images), torch.tensor(labels))


def labelled(key: str, folder: Path, classes: int) -> list[tuple[Path, int]]:
    """Image files below ``folder/<class>/`` with their classes.

    Raises:
        DataError: no such folder, or sub-folders that cannot be the network's classes.
    """
    names = sorted(p.name for p in folder.glob("*") if p.is_dir())
    if not names:
        raise DataError(f"{key}={folder}: expected a folder with one sub-folder per class")
    numbers = {n: int(n) if n.isdecimal() else -1 for n in names}
    if all(n >= 0 for n in numbers.values()):
        if max(numbers.values()) >= classes:
            raise DataError(
                f"{key}={folder}: sub-folder {max(numbers.values())}, but the network "
                f"has classes 0..{classes - 1}"
            )
    elif len(names) == classes:
        numbers = {n: i for i, n in enumerate(names)}
    else:
        raise DataError(
            f"{key}={folder}: {len(names)} sub-folders for {classes} classes; name them by the "
            f"numbers 0..{classes - 1}, or have one for every class"
        )
    files = [(f, label) for n, label in numbers.items() for f in sorted((folder / n).rglob("*"))]
    return [(f, label) for f, label in files if f.suffix.lower() in SUFFIXES and f.is_file()]


def statistics(
    normalization: str | dict[str, list[float]], channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation per channel of a preset or of given values.

    Raises:
        ConfigError: unknown preset, wrong number of values, or a deviation that is not positive.
    """
    key = "data.normalization"
    if isinstance(normalization, str):
        if normalization not in NORMALIZATIONS:
            raise got(key, normalization, f"one of {', '.join(NORMALIZATIONS)}, or mean and std")
        mean, std = NORMALIZATIONS[normalization]
    else:
        if normalization.keys() != {"mean", "std"}:
            raise got(key, normalization, "the keys mean and std")
        mean, std = normalization["mean"], normalization["std"]
    mean, std = (v * channels if len(v) == 1 else v for v in (mean, std))
    if not len(mean) == len(std) == channels or min(std) <= 0:
        raise got(key, normalization, f"{channels} means and {channels} positive deviations")
    return tuple(mean), tuple(std)
