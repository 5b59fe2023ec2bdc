"""A data set as one config node, and its disjoint parts: attacker, defender's pool, test."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal, get_args

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor
from typing_extensions import Unpack

from dhbe.core.errors import ConfigError, DataError
from dhbe.core.rng import generator
from dhbe.core.types import DataSpec
from dhbe.data.images import ImageSet
from dhbe.data.reading import Reading, ReadingOptions, all_of, pixels
from dhbe.data.sources import Part, Source

SIZES = tuple(sorted(base * 2**k for base in (5, 6, 7, 8) for k in range(6)))
"""Image sizes, in pixels, that the image generator can produce (GeneratorB: 5..8 times 2^n)."""


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Disjoint image sets and, for the record, the training positions behind the first two.

    Attributes:
        skipped: files that could not be read and were left out.
        notes: what a reader of the result has to know of how the images were read.
    """

    train: ImageSet
    pool: ImageSet
    test: ImageSet
    train_index: Tensor
    pool_index: Tensor
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Data:
    """One data set: what it looks like, where it is, and how it is split.

    Args:
        train_size: number of official training images, checked after reading (0: unknown).
        pool_fraction: share of the training part that is set aside for the defender.
        split_seed: draws the defender's pool; independent of the run's seed, so that all victims
            of a data set leave the same images untouched.
        storage: ``resident`` keeps all images on the device, ``stream`` decodes them in workers.
        limit: read only ``limit`` images of each part, drawn class-balanced (0: all).
        image_column, label_column: of tables; None finds them.
        content: fingerprint of the file behind ``class_names``.
        options: see ``ReadingOptions``.
    """

    def __init__(
        self,
        *,
        name: str,
        classes: Annotated[int, Ge(2)],
        channels: Literal[1, 3],
        image_size: Annotated[int, Ge(5), Le(2048)],
        mean: list[float],
        std: list[Annotated[float, Gt(0)]],
        flip: bool,
        crop_padding: Annotated[int, Ge(0)],
        balanced: bool,
        train_size: Annotated[int, Ge(0)],
        pool_fraction: Annotated[float, Ge(0), Lt(1)],
        split_seed: int,
        storage: Literal["resident", "stream"],
        limit: Annotated[int, Ge(0)],
        source: Source | None,
        image_column: str | None = None,
        label_column: str | None = None,
        content: str = "",
        **options: Unpack[ReadingOptions],
    ) -> None:
        del content
        if not len(mean) == len(std) == channels:
            raise ConfigError(
                f"data.mean={mean}, data.std={std}: expected one value per channel "
                f"(data.channels={channels})"
            )
        self.spec = DataSpec(
            name=name,
            classes=classes,
            channels=channels,
            image_size=image_size,
            mean=tuple(mean),
            std=tuple(std),
            flip=flip,
            crop_padding=crop_padding,
            balanced=balanced,
        )
        self.reading = Reading(
            classes=classes,
            class_names=options.get("class_names"),
            pixels=pixels(options),
            image_column=image_column,
            label_column=label_column,
        )
        self.train_size, self.pool_fraction, self.split_seed = train_size, pool_fraction, split_seed
        self.stream, self.limit, self.source = storage == "stream", limit, source

    def load(self) -> Splits | None:
        """Read both parts and split the training part, class by class, into attacker and pool.

        None if the set has no source: then nothing is known but its shape.

        Raises:
            DataError: missing or corrupt files, a label outside the classes, a wrong image count.
        """
        if self.source is None:
            return None
        spec = self.spec
        read = partial(
            self.source.load,
            channels=spec.channels,
            size=spec.image_size,
            stream=self.stream,
        )
        rng = generator(self.split_seed, "split", spec.name)
        train, test = (
            read(part, reading=replace(self.reading, keep=partial(self._kept, part, rng)))
            for part in get_args(Part)
        )
        parts = {f"{spec.name} train": train, f"{spec.name} test": test}
        notes = tuple(f"{part}: {note}" for part, s in parts.items() for note in s.notes)
        pool = stratified(train.labels, self.pool_fraction, rng, groups=train.groups)
        rest = torch.ones(len(train), dtype=torch.bool)
        rest[pool] = False
        keep = rest.nonzero().flatten()
        return Splits(
            train=train.subset(keep),
            pool=train.subset(pool),
            test=test,
            train_index=keep,
            pool_index=pool,
            notes=notes,
        )

    def _kept(self, part: str, rng: torch.Generator, labels: Tensor) -> Tensor:
        """Positions of the images to read, once the labels (N,) of a whole part are seen to fit."""
        name, classes = self.spec.name, self.spec.classes
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= classes:
            raise DataError(
                f"{name} {part}: labels {low}..{high}, expected 0..{classes - 1} "
                f"(data.classes={classes})"
            )
        if part == "train" and self.train_size not in (0, len(labels)):
            raise DataError(
                f"{name}: {len(labels)} training images, expected {self.train_size}; "
                "a file is missing or incomplete"
            )
        return stratified(labels, self.limit / len(labels), rng) if self.limit else all_of(labels)


_last: dict[str, Splits | None] = {}


def load(data: Data, name: str) -> Splits | None:
    """The images of a data set; the last one stays in memory for the next run of a sweep.

    Args:
        name: fingerprint of the data set's config, the state of the user's files included.
    """
    if name not in _last:
        _last.clear()
        _last[name] = data.load()
    return _last[name]


def stratified(
    labels: Tensor, fraction: float, rng: torch.Generator, *, groups: Tensor | None = None
) -> Tensor:
    """Sorted positions of a random ``fraction`` of every class.

    With ``groups`` (N,), whole groups are drawn until the class has its share (at least one group,
    if any is asked for), so that no group has members on both sides.
    """
    chosen = []
    for c in labels.unique():
        members = (labels == c).nonzero().flatten()
        want = round(fraction * len(members))
        if groups is None:
            chosen.append(members[torch.randperm(len(members), generator=rng)[:want]])
            continue
        names = groups[members].unique()
        names = names[torch.randperm(len(names), generator=rng)]
        sizes = torch.stack([(groups[members] == g).sum() for g in names])
        before = sizes.cumsum(0) - sizes
        chosen.append(members[torch.isin(groups[members], names[before < want])])
    return torch.cat(chosen).sort().values if chosen else torch.empty(0, dtype=torch.int64)


def proportional(labels: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """Sorted positions of exactly ``count`` images (or all of fewer), classes in proportion.

    Every class is shuffled and laid out evenly over (0, 1); the first ``count`` images are taken.
    """
    place = torch.empty(len(labels))
    for c in labels.unique():
        members = (labels == c).nonzero().flatten()
        order = torch.randperm(len(members), generator=rng)
        place[members] = (order + torch.rand(1, generator=rng)) / len(members)
    return place.argsort()[:count].sort().values
