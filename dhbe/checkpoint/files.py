"""Files of weights: where each tensor lies, read without executing anything.

Three formats: safetensors, ``torch.save`` before version 1.6, and its zip archives since then. How
they are written back is told in ``rebuilt.py``.
"""

from __future__ import annotations

import gc
import io
import math
import struct
import zipfile
from pathlib import Path
from typing import Any

from dhbe.checkpoint.archives import Archive
from dhbe.checkpoint.kinds import named
from dhbe.checkpoint.pickles import Opaque, Refused, StorageRef, TensorRef, read_pickle, shown
from dhbe.checkpoint.places import (
    DTYPES,
    MAX_HEADER,
    MAX_PICKLE,
    MAX_TENSORS,
    STORAGES,
    Place,
    contiguous,
)
from dhbe.checkpoint.records import WeightFile, parse_json
from dhbe.checkpoint.sources import Source

__all__ = [
    "DAMAGE",
    "MAX_HEADER",
    "MAX_TENSORS",
    "Place",
    "WeightFile",
    "open_weights",
    "parse_json",
]

MAX_BYTES = 4 * 2**30
"""Of a file."""


class Safetensors(WeightFile):
    """An 8-byte length, a JSON header, the tensors without gap or overlap."""

    kind = "safetensors"

    def __init__(self, path: Path, source: Source) -> None:
        super().__init__(path, source)
        (length,) = struct.unpack("<Q", source.span(0, 8))
        room = source.size - 8
        if not 2 <= length <= min(MAX_HEADER, room):
            raise Refused(
                f"a header of {length:,} bytes; at most {MAX_HEADER:,} and the file's {room:,}"
            )
        header = parse_json(source.span(8, length))
        self.start = 8 + length
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise Refused("metadata that is not text")
        self.metadata = metadata
        if len(header) > MAX_TENSORS:
            raise Refused(f"{len(header):,} tensors; at most {MAX_TENSORS:,}")
        self.spans: dict[str, tuple[int, int]] = {}
        self.content = {k: self._entry(k, v) for k, v in header.items()}
        at = 0
        for start, stop in sorted(self.spans.values()):
            if start != at:
                raise Refused(f"tensors overlap, or leave a gap, at byte {min(start, at):,}")
            at = stop
        if self.start + at != source.size:
            raise Refused(f"tensors cover {at:,} of {source.size - self.start:,} bytes")

    def _entry(self, key: str, value: Any) -> Place:
        try:
            dtype, shape = DTYPES[value["dtype"]], tuple(value["shape"])
            start, stop = value["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise Refused(
                f"tensor '{shown(key)}': unknown type or no place ({shown(error)})"
            ) from error
        numbers = (*shape, start, stop) if len(shape) <= 8 else (-1,)
        if any(type(n) is not int or not 0 <= n < 2**40 for n in numbers):
            raise Refused(f"tensor '{shown(key)}': impossible shape or offsets")
        if stop - start != math.prod(shape) * dtype.itemsize:
            raise Refused(f"tensor '{shown(key)}': shape {shape} and bytes {start}..{stop} differ")
        self.spans[key] = (start, stop)
        return Place(key, dtype, 0, shape, contiguous(shape))

    def where(self, record: str) -> tuple[int, int]:
        start, stop = self.spans[record]
        return self.start + start, stop - start


class Legacy(WeightFile):
    """``torch.save`` before version 1.6: pickles one after another, then the storages."""

    kind = "torch (before 1.6)"
    MAGIC = 0x1950A86A20F9469CFC6C

    def __init__(self, path: Path, source: Source) -> None:
        super().__init__(path, source)
        head = io.BytesIO(source.span(0, min(MAX_PICKLE, source.size)))
        try:
            magic = read_pickle(head)
        except Refused as error:
            raise Refused(f"neither safetensors nor a file of torch.save ({error})") from None
        if not isinstance(magic, Opaque) or magic.args != (self.MAGIC,):
            raise Refused("a pickle, but not one of torch.save")
        protocol, system = read_pickle(head), read_pickle(head)
        if protocol != 1001 or type(system) is not dict or not system.get("little_endian"):
            raise Refused("an unknown protocol, or of a big-endian machine")
        tree, keys = read_pickle(head), read_pickle(head)
        if type(keys) is not list or any(type(k) is not str for k in keys):
            raise Refused("a list of storages that are not named by text")
        if len(set(keys)) != len(keys) or len(keys) > MAX_TENSORS:
            raise Refused(f"a storage that is listed twice, or more than {MAX_TENSORS:,}")
        kinds, position = collected(tree), head.tell()
        self.spans: dict[str, tuple[int, int]] = {}
        for key in keys:
            if key not in kinds or kinds[key].kind not in STORAGES:
                raise Refused(f"storage '{shown(key)}' has no known type")
            (count,) = struct.unpack("<q", source.span(position, 8))
            width = STORAGES[kinds[key].kind].itemsize
            if count < 0 or position + 8 + count * width > source.size:
                raise Refused(f"storage '{shown(key)}' is longer than the file")
            self.spans[key] = (position + 8, count * width)
            position += 8 + count * width
        self.content = self.converted(tree)

    def where(self, record: str) -> tuple[int, int]:
        return self.spans[record]


DAMAGE = (
    *(zipfile.BadZipFile, zipfile.LargeZipFile, struct.error, EOFError, ValueError, TypeError),
    *(AttributeError, RuntimeError, ArithmeticError, LookupError, NotImplementedError),
)
"""What reading can end in if a file is not what it seems."""


def open_weights(path: Path) -> WeightFile:
    """The file, its format found by content, not by suffix.

    Raises:
        Refused: no such format, damaged, larger than 4 GB, or more than data.
    """
    if not path.is_file():
        raise Refused("no such file" if not path.exists() else "not a file")
    source = Source(path)
    head = bytes(source.span(0, min(512, source.size)))
    kind = named(head)
    if kind and not (head[8:9] == b"{" and source.size >= 10):
        raise Refused(kind)
    if not 8 <= source.size <= MAX_BYTES:
        raise Refused(f"{source.size:,} bytes; expected 8 to {MAX_BYTES:,}")
    collecting = gc.isenabled()
    gc.disable()  # millions of small objects would be looked through again and again
    try:
        if head.startswith(b"PK\x03\x04"):
            return Archive(path, source)
        if head[8:9] == b"{":
            return Safetensors(path, source)
        return Legacy(path, source)
    except RecursionError:
        raise Refused("nested too deeply") from None
    except DAMAGE as error:
        raise Refused(f"damaged ({shown(error, 200)})") from error
    finally:
        if collecting:
            gc.enable()


def collected(tree: Any) -> dict[str, StorageRef]:
    """All storages that a pickle mentions, by name."""
    kinds: dict[str, StorageRef] = {}
    todo, seen = [tree], set()
    while todo:
        item = todo.pop()
        if isinstance(item, TensorRef):
            kinds[item.storage.record] = item.storage
        elif isinstance(item, StorageRef):
            kinds[item.record] = item
        elif isinstance(item, (dict, list, tuple, Opaque)) and id(item) not in seen:
            seen.add(id(item))
            if isinstance(item, Opaque):
                todo += [item.args, item.state, item.items]
            else:
                todo += item.values() if isinstance(item, dict) else item
    return kinds
