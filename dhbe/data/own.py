"""A user's own images for a network of unknown origin: folders of classes, or nothing at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Le
from typing_extensions import Unpack

from dhbe.core.errors import DataError, got
from dhbe.core.types import DataSpec
from dhbe.data.classes import Labelled, class_folders, class_list, labelled
from dhbe.data.images import ImageSet, Resident, image_bytes
from dhbe.data.reading import Reading, ReadingOptions, pixels
from dhbe.data.splits import Data, Splits
from dhbe.data.survey import assembled

CLASS_LIST = "classes.txt"
"""In ``clean`` or ``test``: names of all classes in order."""

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
        options: see ``ReadingOptions``.

    ``dhbe.data.classes`` says which sub-folder is which class.
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
        **options: Unpack[ReadingOptions],
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
        self.reading = Reading(
            classes=classes, class_names=options.get("class_names"), pixels=pixels(options)
        )

    def load(self) -> Splits | None:
        """The images of both folders; None if neither is given.

        Raises:
            DataError: no image, an unreadable one, or folders that do not match the classes.
        """
        given = {k: Path(f).expanduser() for k, f in self.folders.items() if f}
        if not given:
            return None
        lists = [folder / CLASS_LIST for folder in given.values()]
        classes = self.spec.classes
        listed = class_list(self.reading.class_names, lists, classes)
        for key, folder in given.items():
            if not class_folders(folder):
                raise DataError(f"{key}={folder}: expected a folder with one sub-folder per class")
        named = {f"{key}={folder}": folder for key, folder in given.items()}
        found, notes = labelled(named, classes=classes, listed=listed)
        if len({folder.resolve() for folder in given.values()}) < len(given):
            notes.append(
                "WARNING: data.clean and data.test are one folder: the defense has seen the images "
                "that it is measured on"
            )
        none = torch.empty(0, dtype=torch.int64)
        empty = Resident(torch.empty((0, *self.spec.shape), dtype=torch.uint8), none)
        read, skipped = self._read(found)
        sets = dict(zip(given, read, strict=True))
        clean, test = (sets.get(key, empty) for key in self.folders)
        return Splits(
            train=empty,
            pool=clean,
            test=test,
            train_index=none,
            pool_index=torch.arange(len(clean)),
            skipped=tuple(skipped),
            notes=(*notes, *(f"{k}: {n}" for k, s in sets.items() for n in s.notes)),
        )

    def _read(self, parts: Mapping[str, Labelled]) -> tuple[list[ImageSet], list[str]]:
        """The images of each part, and the files that were left out."""
        sets, skipped = [], []
        for where, files in parts.items():

            def encoded(position: int, files: Labelled = files) -> tuple[str, bytes]:
                file = files[position][0]
                return str(file), image_bytes(file)

            bad: list[int] = []
            try:
                images = assembled(
                    encoded,
                    [label for _, label in files],
                    channels=self.spec.channels,
                    size=self.spec.image_size,
                    stream=False,
                    how=self.reading.pixels,
                    skipped=bad if self.skip_unreadable else None,
                )
            except DataError as error:
                raise DataError(f"{error}; data.skip_unreadable=true leaves it out") from error
            if not len(images):
                raise DataError(f"{where}: no readable image in it")
            sets.append(images)
            skipped += [str(files[i][0]) for i in bad]
        return sets, skipped


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
