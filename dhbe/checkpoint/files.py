"""Files of weights: where each tensor lies, read and written back without executing anything.

A purified file is the given one with the bytes of its weights exchanged, so its format, nesting and
key layout stay what they were.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import stat
import struct
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dhbe.checkpoint.pickles import (
    Opaque,
    Refused,
    StorageRef,
    TensorRef,
    read_pickle,
    shown,
)

MAX_BYTES = 4 * 2**30
"""Of a file."""
MAX_HEADER = 16 * 2**20
"""Of a safetensors header, a zip directory, a JSON record."""
MAX_PICKLE = 64 * 2**20
MAX_TENSORS = 10_000
MAX_SCRIPT_DEPTH = 50

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
EXPORT_DTYPES = dict(enumerate([*[None] * 7, torch.float32, torch.float64]))
EXPORT_DTYPES |= {1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64}
EXPORT_DTYPES |= {6: torch.float16, 12: torch.bool, 13: torch.bfloat16}
"""Numbers of ``torch._export.serde.schema.ScalarType``."""


class Place(NamedTuple):
    """Where a tensor lies: record of the file, type, and view of the record in elements."""

    record: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor by itself."""
        return math.prod(self.shape) * self.dtype.itemsize

    def view(self, raw: bytearray) -> Tensor:
        """The tensor inside the record's bytes; shares their memory."""
        if not self.nbytes:
            return torch.empty(self.shape, dtype=self.dtype)
        flat = torch.frombuffer(raw, dtype=self.dtype)
        return flat.as_strided(self.shape, self.stride, self.offset)


class WeightFile(ABC):
    """One file; ``content`` is a nesting of dicts with a ``Place`` wherever there is a tensor."""

    kind: str
    program = False
    """Whether the file also holds code, which a purified copy must not pass on unread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: Any = None
        self.metadata: dict[str, str] = {}
        self._seen: dict[int, tuple[Any, Any]] = {}

    def locate(self, storage: str) -> str:
        """Record of a storage that a pickle names."""
        return storage

    @abstractmethod
    def size(self, record: str) -> int:
        """Bytes of a record; KeyError if there is none."""

    @abstractmethod
    def read(self, record: str) -> bytearray:
        """A record's bytes."""

    @abstractmethod
    def write(self, target: Path, records: Mapping[str, bytes]) -> None:
        """A copy of the file with other bytes, of the same number, in some records."""

    def place(self, ref: TensorRef) -> Place:
        """Check a tensor of a pickle against the record it points into.

        Raises:
            Refused: unknown type, missing record, or a view that leaves it or repeats elements.
        """
        if ref.storage.kind not in STORAGES:
            raise Refused(f"a tensor of type {ref.storage.kind}; known: {sorted(STORAGES)}")
        dtype = STORAGES[ref.storage.kind]
        record = self.locate(ref.storage.record)
        try:
            held = self.size(record) // dtype.itemsize
        except KeyError:
            raise Refused(f"storage '{shown(ref.storage.record)}' is not in the file") from None
        last = ref.offset + sum((n - 1) * s for n, s in zip(ref.shape, ref.stride, strict=True))
        numel = math.prod(ref.shape)
        if self.size(record) % dtype.itemsize:
            raise Refused(f"a storage of {self.size(record)} bytes for numbers of {dtype}")
        if numel and overlaps(ref.shape, ref.stride):
            raise Refused(f"a tensor of shape {ref.shape} and stride {ref.stride} overlaps itself")
        if held < ref.storage.numel or (numel and (last >= held or numel > held)):
            raise Refused(
                f"a tensor of shape {ref.shape} and stride {ref.stride} does not fit its storage "
                f"of {held} elements"
            )
        return Place(record, dtype, ref.offset, ref.shape, ref.stride)

    def placed(self, value: Any, depth: int = 0) -> Any:
        """The value with tensors as ``Place``, modules of a script as dicts of their parts.

        What occurs in many places is looked at once: it may hold itself many times over.
        """
        if isinstance(value, TensorRef):
            return self.place(value)
        if isinstance(value, Opaque):
            if not value.name.startswith("__torch__"):
                return value.items or value
            value = value.state if isinstance(value.state, dict) else {}
        if not isinstance(value, dict) or depth >= MAX_SCRIPT_DEPTH:
            return value
        if id(value) not in self._seen:
            made = {k: self.placed(v, depth + 1) for k, v in value.items()}
            self._seen[id(value)] = (value, made)  # kept, so that the number stays its own
        return self._seen[id(value)][1]


class Safetensors(WeightFile):
    """An 8-byte length, a JSON header, the tensors."""

    kind = "safetensors"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
            room = path.stat().st_size - 8
            if not 2 <= length <= min(MAX_HEADER, room):
                raise Refused(
                    f"a header of {length:,} bytes; at most {MAX_HEADER:,} and the file's {room:,}"
                )
            header = parse_json(file.read(length))
        self.start, end = 8 + length, path.stat().st_size
        self.metadata = header.pop("__metadata__", {})
        if not isinstance(self.metadata, dict) or not all(
            isinstance(v, str) for v in self.metadata.values()
        ):
            raise Refused("metadata that is not text")
        if len(header) > MAX_TENSORS:
            raise Refused(f"{len(header):,} tensors; at most {MAX_TENSORS:,}")
        self.spans: dict[str, tuple[int, int]] = {}
        self.content = {k: self._entry(k, v, end) for k, v in header.items()}
        covered = sum(stop - start for start, stop in self.spans.values())
        if self.start + covered != end:
            raise Refused(f"tensors cover {covered:,} of {end - self.start:,} bytes")

    def _entry(self, key: str, value: Any, end: int) -> Place:
        try:
            dtype, shape = DTYPES[value["dtype"]], tuple(value["shape"])
            start, stop = value["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise Refused(f"tensor '{shown(key)}': unknown type or no place ({error})") from error
        numbers = (*shape, start, stop)
        if len(shape) > 8 or any(type(n) is not int or not 0 <= n < 2**40 for n in numbers):
            raise Refused(f"tensor '{shown(key)}': impossible shape or offsets")
        if stop - start != math.prod(shape) * dtype.itemsize or self.start + stop > end:
            raise Refused(
                f"tensor '{shown(key)}': shape {shape} and bytes {start}..{stop} of {end} disagree"
            )
        self.spans[key] = (self.start + start, self.start + stop)
        stride = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        return Place(key, dtype, 0, shape, tuple(stride))

    def size(self, record: str) -> int:
        start, stop = self.spans[record]
        return stop - start

    def read(self, record: str) -> bytearray:
        start, stop = self.spans[record]
        return read_span(self.path, start, stop - start)

    def write(self, target: Path, records: Mapping[str, bytes]) -> None:
        patch(self.path, target, {self.spans[k][0]: v for k, v in records.items()})


class Legacy(WeightFile):
    """``torch.save`` before version 1.6: pickles one after another, then the storages."""

    kind = "torch (before 1.6)"
    MAGIC = 0x1950A86A20F9469CFC6C

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with path.open("rb") as file:
            head = io.BytesIO(file.read(MAX_PICKLE))
        try:
            magic = read_pickle(head)
        except Refused as error:
            raise Refused(f"neither safetensors nor a file of torch.save ({error})") from None
        if magic != self.MAGIC:
            raise Refused("a pickle, but not one of torch.save")
        protocol, system = read_pickle(head), read_pickle(head)
        if protocol != 1001 or not isinstance(system, dict) or not system.get("little_endian"):
            raise Refused("an unknown protocol, or of a big-endian machine")
        tree, keys = read_pickle(head), read_pickle(head)
        kinds: dict[str, StorageRef] = {}
        _collect(tree, kinds)
        self.spans: dict[str, tuple[int, int]] = {}
        position = head.tell()
        if not isinstance(keys, list) or any(type(k) is not str for k in keys):
            raise Refused("a list of storages that are not named by text")
        if len(set(keys)) != len(keys):
            raise Refused("a storage that is listed twice")
        for key in keys:
            if key not in kinds or kinds[key].kind not in STORAGES:
                raise Refused(f"storage '{shown(key)}' has no known type")
            (count,) = struct.unpack("<q", read_span(path, position, 8))
            width = STORAGES[kinds[key].kind].itemsize
            if count < 0 or position + 8 + count * width > path.stat().st_size:
                raise Refused(f"storage '{shown(key)}' is longer than the file")
            self.spans[key] = (position + 8, count * width)
            position += 8 + count * width
        self.content = self.placed(tree)

    def size(self, record: str) -> int:
        return self.spans[record][1]

    def read(self, record: str) -> bytearray:
        return read_span(self.path, *self.spans[record])

    def write(self, target: Path, records: Mapping[str, bytes]) -> None:
        patch(self.path, target, {self.spans[k][0]: v for k, v in records.items()})


class Archive(WeightFile):
    """``torch.save`` since 1.6, TorchScript and ``torch.export``: a zip of uncompressed records."""

    kind = "torch"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with path.open("rb") as file:
            end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
        if end is None or end[zipfile._ECD_SIZE] > MAX_HEADER:  # type: ignore[attr-defined]
            raise Refused("no directory of the zip, or one too large; truncated?")
        self.zip = zipfile.ZipFile(path)
        names = self.zip.namelist()
        self.root = next((part for n in names[:1] for part in PurePosixPath(n).parts[:1]), "")
        self._check_entries()
        if f"{self.root}/byteorder" in names and (
            self.size("byteorder") > len(b"little\r\n")
            or self.read("byteorder").strip() != b"little"
        ):
            raise Refused("of a big-endian machine")
        if f"{self.root}/data/weights/model_weights_config.json" in names:
            self.kind, self.program = "torch.export", True
            self.content = self._exported()
            return
        if f"{self.root}/data.pkl" not in names:
            raise Refused("a zip, but not one of torch.save (no data.pkl)")
        if self.zip.getinfo(f"{self.root}/data.pkl").file_size > MAX_PICKLE:
            raise Refused(f"a data.pkl of more than {MAX_PICKLE:,} bytes")
        if any(n.startswith(f"{self.root}/code/") for n in names):
            self.kind, self.program = "TorchScript", True
        self.content = self.placed(read_pickle(io.BytesIO(self.read("data.pkl"))))
        if self.program:
            self.content = flattened(self.content)

    def _check_entries(self) -> None:
        """Refuse whatever could unpack to more, elsewhere, or twice."""
        infos = self.zip.infolist()
        names = {i.filename for i in infos}
        if not 0 < len(infos) <= MAX_TENSORS or len(names) != len(infos):
            raise Refused(
                f"{len(infos):,} records, {len(infos) - len(names)} with a name used twice"
            )
        room = self.path.stat().st_size
        if sum(i.compress_size for i in infos) > room:
            raise Refused("records that overlap")
        for info in infos:
            name, parts = info.filename, PurePosixPath(info.filename).parts
            if len(parts) < 2 or ".." in parts or parts[0] == "/" or re.search(r"[\\:\0]", name):
                raise Refused(f"record '{shown(name)}': a name that leaves its folder")
            if stat.S_ISLNK(info.external_attr >> 16) or info.flag_bits & 1:
                raise Refused(f"record '{shown(name)}': a symbolic link, or encrypted")
            if name.startswith(f"{self.root}/code/"):  # of a program, and never read
                continue
            packed = info.compress_type != zipfile.ZIP_STORED
            if packed or info.compress_size != info.file_size:
                raise Refused(
                    f"record '{shown(name)}': compressed; torch stores tensors as they are"
                )

    def _exported(self) -> dict[str, Place]:
        record = "data/weights/model_weights_config.json"
        if self.size(record) > MAX_HEADER:
            raise Refused("a weights config of more than 16 MB")
        found = {}
        for key, value in parse_json(bytes(self.read(record))).get("config", {}).items():
            try:
                meta = value["tensor_meta"]
                shape = tuple(n["as_int"] for n in meta["sizes"])
                stride = tuple(n["as_int"] for n in meta["strides"])
                dtype = EXPORT_DTYPES[meta["dtype"]]
                storage = next(k for k, v in STORAGES.items() if v == dtype)
                raw = StorageRef(value["path_name"], storage, 0)
                ref = (raw, meta["storage_offset"]["as_int"], shape, stride)
            except (KeyError, TypeError, StopIteration) as error:
                raise Refused(f"weight '{shown(key)}' is not described as expected") from error
            numbers = (ref[1], *shape, *stride)
            if value.get("use_pickle") or any(
                type(n) is not int or not 0 <= n < 2**40 for n in numbers
            ):
                raise Refused(f"weight '{shown(key)}' is a pickle or has an impossible shape")
            found[key] = self.place(TensorRef(*ref))
        return found

    def locate(self, storage: str) -> str:
        folder = "data/weights" if self.kind == "torch.export" else "data"
        return f"{folder}/{storage}"

    def size(self, record: str) -> int:
        return self.zip.getinfo(f"{self.root}/{record}").file_size

    def read(self, record: str) -> bytearray:
        try:
            return bytearray(self.zip.read(f"{self.root}/{record}"))
        except zipfile.BadZipFile as error:
            raise Refused(f"damaged ({error})") from error

    def write(self, target: Path, records: Mapping[str, bytes]) -> None:
        new = {f"{self.root}/{k}": v for k, v in records.items()}
        with zipfile.ZipFile(target, "w") as copy:
            for info in self.zip.infolist():
                record = zipfile.ZipInfo(info.filename)
                start = copy.fp.tell() + 30 + len(record.filename.encode()) + 4  # type: ignore[union-attr]
                padding = -start % 64  # torch aligns records, so that they can be mapped
                record.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
                copy.writestr(record, new.get(info.filename) or self.zip.read(info))


DAMAGE = (
    *(zipfile.BadZipFile, struct.error, EOFError, ValueError, TypeError, AttributeError),
    *(RuntimeError, ArithmeticError, LookupError),
)
"""What reading can end in if a file is not what it seems."""


def open_weights(path: Path) -> WeightFile:
    """The file, its format found by content, not by suffix.

    Raises:
        Refused: no such format, damaged, larger than 4 GB, or more than data.
    """
    if not path.is_file():
        raise Refused("no such file")
    size = path.stat().st_size
    if not 8 <= size <= MAX_BYTES:
        raise Refused(f"{size:,} bytes; expected 8 to {MAX_BYTES:,}")
    with path.open("rb") as file:
        head = file.read(10)
    try:
        if head.startswith(b"PK\x03\x04"):
            return Archive(path)
        if head[8:9] == b"{":
            return Safetensors(path)
        return Legacy(path)
    except DAMAGE as error:
        raise Refused(f"damaged ({shown(error, 200)})") from error
    except RecursionError:
        raise Refused("nested too deeply") from None


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
        raise Refused(f"a header that is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise Refused("a header that is not a JSON object")
    return found


def flattened(content: Any) -> dict[str, Place]:
    """State dict of nested modules: paths joined by dots.

    Raises:
        Refused: there are too many paths; modules that are shared can have any number.
    """
    found: dict[str, Place] = {}
    todo, looked = [("", content)], 0
    while todo:
        prefix, module = todo.pop()
        entries = list(module.items()) if isinstance(module, dict) else []
        looked += 1 + len(entries)
        if looked > 10 * MAX_TENSORS:
            raise Refused("too many parts of modules")
        for key, value in entries:
            if isinstance(value, dict):
                todo.append((f"{prefix}{key}.", value))
            elif isinstance(value, Place):
                found[f"{prefix}{key}"] = value
    return found


def overlaps(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether two elements of a strided view may lie in one place."""
    reach = 1
    for step, count in sorted((s, n) for n, s in zip(shape, stride, strict=True) if n > 1):
        if step < reach:
            return True
        reach = step * (count - 1) + reach
    return False


def read_span(path: Path, start: int, length: int) -> bytearray:
    """``length`` bytes from ``start``."""
    with path.open("rb") as file:
        file.seek(start)
        raw = bytearray(file.read(length))
    if len(raw) != length:
        raise Refused("the file ends too early")
    return raw


def patch(source: Path, target: Path, spans: Mapping[int, bytes]) -> None:
    """Copy a file with other bytes at some positions."""
    shutil.copyfile(source, target)
    os.chmod(target, 0o644)
    with target.open("r+b") as file:
        for start, raw in spans.items():
            file.seek(start)
            file.write(raw)


def _collect(value: Any, kinds: dict[str, StorageRef]) -> None:
    """All storages that a tree mentions, without recursion."""
    todo, seen = [value], set()
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
