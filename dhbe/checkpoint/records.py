"""A file of weights as a nesting of containers, with places where there are tensors."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dhbe.checkpoint.contents import Converter
from dhbe.checkpoint.pickles import Refused, TensorRef, shown
from dhbe.checkpoint.places import STORAGES, Place, overlaps
from dhbe.checkpoint.sources import Source


class WeightFile(ABC):
    """One file; ``content`` is a nesting of containers with a ``Place`` where there is a tensor."""

    kind: str
    program = False
    """Whether only the weights are written back: the rest is code, or not one file."""

    def __init__(self, path: Path, source: Source) -> None:
        self.path, self.source = path, source
        self.content: Any = None
        self.metadata: dict[str, str] = {}
        self.arrays: dict[str, bytes] = {}
        """Records inside the pickle: numpy arrays."""
        self._types: dict[str, torch.dtype] = {}

    @abstractmethod
    def where(self, record: str) -> tuple[int, int]:
        """First byte and length of a record; KeyError if there is none."""

    def locate(self, storage: str) -> str:
        """Record of a storage that a pickle names."""
        return storage

    def size(self, record: str) -> int:
        """Bytes of a record; KeyError if there is none."""
        return len(self.arrays[record]) if record in self.arrays else self.where(record)[1]

    def part(self, record: str, start: int, length: int) -> bytearray:
        """Some bytes of a record."""
        if record in self.arrays:
            return bytearray(self.arrays[record][start : start + length])
        first, held = self.where(record)
        if start + length > held:
            raise Refused("a record that ends too early")
        return self.source.span(first + start, length)

    def read(self, record: str) -> bytearray:
        """A record's bytes."""
        return self.part(record, 0, self.size(record))

    def tensor(self, place: Place) -> Tensor:
        """A copy of a tensor, in its own shape and type; no other bytes of the file are read."""
        raw = self.part(place.record, place.offset * place.dtype.itemsize, place.reach)
        return place._replace(offset=0).view(raw).clone()

    def digest(self) -> str:
        """SHA-256 of the file that all of this was read from."""
        return self.source.sha256()

    def verify(self) -> None:
        """Compare checksums, where the format has some.

        Raises:
            Refused: a record is damaged.
        """

    def converted(self, tree: Any) -> Any:
        """What a pickle held, with places for tensors and arrays."""
        converter = Converter(self.place, self.source.size)
        content = converter.value(tree)
        self.arrays = converter.arrays
        return content

    def place(self, ref: TensorRef) -> Place:
        """Check a tensor of a pickle against the record it points into.

        Raises:
            Refused: unknown type, missing record, or a view that leaves it or repeats elements.
        """
        if ref.storage.kind not in STORAGES:
            raise Refused(f"a tensor of type {shown(ref.storage.kind)}; known: {sorted(STORAGES)}")
        dtype = STORAGES[ref.storage.kind]
        record = self.locate(ref.storage.record)
        try:
            size = self.size(record)
        except KeyError:
            raise Refused(f"storage '{shown(ref.storage.record)}' is not in the file") from None
        if self._types.setdefault(record, dtype) != dtype:
            raise Refused(f"storage '{shown(ref.storage.record)}' has two types")
        held, place = size // dtype.itemsize, Place(record, dtype, *ref[1:])
        if size % dtype.itemsize:
            raise Refused(f"a storage of {size} bytes for numbers of {dtype}")
        if place.nbytes and overlaps(ref.shape, ref.stride):
            raise Refused(f"a tensor of shape {ref.shape} and stride {ref.stride} overlaps itself")
        if held < ref.storage.numel or ref.offset * dtype.itemsize + place.reach > size:
            raise Refused(
                f"a tensor of shape {ref.shape} and stride {ref.stride} does not fit its storage "
                f"of {held} elements"
            )
        return place


def parse_json(raw: bytes | bytearray) -> dict[str, Any]:
    """A JSON object without duplicate keys.

    Raises:
        Refused: it is none.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise Refused("the header names a tensor twice")
        return found

    try:
        found = json.loads(raw, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise Refused(f"a header that is not JSON ({shown(error, 120)})") from error
    if not isinstance(found, dict):
        raise Refused("a header that is not a JSON object")
    return found
