"""``torch.save`` since 1.6, TorchScript and ``torch.export``: a zip of uncompressed records."""

from __future__ import annotations

import io
import re
import stat
import struct
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from dhbe.checkpoint.kinds import named_archive
from dhbe.checkpoint.pickles import Refused, StorageRef, TensorRef, read_pickle, shown
from dhbe.checkpoint.places import MAX_HEADER, MAX_NAME, MAX_PICKLE, MAX_TENSORS, STORAGES, Place
from dhbe.checkpoint.records import WeightFile, parse_json
from dhbe.checkpoint.sources import CHUNK, Source

MAX_DIRECTORY = 4 * 2**20
"""Of a zip."""
EXPORT_DTYPES = dict(enumerate([*[None] * 7, torch.float32, torch.float64]))
EXPORT_DTYPES |= {1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64}
EXPORT_DTYPES |= {6: torch.float16, 12: torch.bool, 13: torch.bfloat16}
"""Numbers of ``torch._export.serde.schema.ScalarType``."""


class Archive(WeightFile):
    """``torch.save`` since 1.6, TorchScript and ``torch.export``: a zip of uncompressed records."""

    kind = "torch"

    def __init__(self, path: Path, source: Source) -> None:
        super().__init__(path, source)
        end = zipfile._EndRecData(source)  # type: ignore[attr-defined]
        if end is None or end[zipfile._ECD_SIZE] > MAX_DIRECTORY:  # type: ignore[attr-defined]
            raise Refused("no directory of the zip, or one too large; truncated?")
        self.infos = {i.filename: i for i in self._checked(zipfile.ZipFile(source).infolist())}
        first = next(iter(self.infos), "")
        self.root = PurePosixPath(first).parts[0]
        if "byteorder" in self and (
            self.size("byteorder") > len(b"little\r\n")
            or self.read("byteorder").strip() != b"little"
        ):
            raise Refused("of a big-endian machine")
        if "data/weights/model_weights_config.json" in self:
            self.kind, self.program = "torch.export", True
            self.content = self._exported()
            return
        if "data.pkl" not in self:
            kind = named_archive(self.infos)
            raise Refused(kind or "a zip, but not one of torch.save (no data.pkl)")
        if self.size("data.pkl") > MAX_PICKLE:
            raise Refused(f"a data.pkl of more than {MAX_PICKLE:,} bytes")
        self._check_sum("data.pkl")
        self.program = any(n.startswith(f"{self.root}/code/") for n in self.infos)
        self.content = self.converted(read_pickle(io.BytesIO(self.read("data.pkl"))))
        if self.program:
            self.kind, self.content = "TorchScript", flattened(self.content)

    def __contains__(self, record: str) -> bool:
        return f"{self.root}/{record}" in self.infos

    def _checked(self, infos: list[zipfile.ZipInfo]) -> list[zipfile.ZipInfo]:
        """Refuse archives that could unpack to more data, to other places, or twice."""
        names = {i.filename for i in infos}
        if not 0 < len(infos) <= MAX_TENSORS or len(names) != len(infos):
            raise Refused(
                f"{len(infos):,} records, {len(infos) - len(names)} with a name used twice"
            )
        if any(i.filename == "data.pkl" or "/" not in i.filename for i in infos):
            raise Refused(named_archive(names) or "a zip, but not one of torch.save (no folder)")
        for info in infos:
            name, parts = info.filename, PurePosixPath(info.filename).parts
            inner = name.partition("/")[2]  # before it stands the file's name, whatever it was
            if len(parts) < 2 or {"..", "/"} & set(parts) or re.search(r"[\\:\0]", inner):
                raise Refused(f"record '{shown(name)}': a name that leaves its folder")
            if stat.S_ISLNK(info.external_attr >> 16) or info.flag_bits & 1:
                raise Refused(f"record '{shown(name)}': a symbolic link, or encrypted")
            if parts[1] == "code" and parts[0] == PurePosixPath(infos[0].filename).parts[0]:
                continue  # of a program, and never read
            packed = info.compress_type != zipfile.ZIP_STORED
            if packed or info.compress_size != info.file_size:
                if kind := named_archive(names):
                    raise Refused(kind)
                raise Refused(
                    f"record '{shown(name)}': compressed; torch stores tensors as they are"
                )
        ordered = sorted(infos, key=lambda i: i.header_offset)
        ends = [i.header_offset + 30 + len(i.filename) + i.compress_size for i in ordered]
        starts = [*(i.header_offset for i in ordered[1:]), self.source.size]
        if any(end > start for end, start in zip(ends, starts, strict=True)):
            raise Refused("records that overlap")
        return infos

    def _exported(self) -> dict[str, Place]:
        record = "data/weights/model_weights_config.json"
        if self.size(record) > MAX_HEADER:
            raise Refused("a weights config of more than 16 MB")
        found = {}
        for key, value in parse_json(self.read(record)).get("config", {}).items():
            try:
                meta = value["tensor_meta"]
                shape = tuple(n["as_int"] for n in meta["sizes"])
                stride = tuple(n["as_int"] for n in meta["strides"])
                offset = meta["storage_offset"]["as_int"]
                dtype = EXPORT_DTYPES[meta["dtype"]]
                storage = next(k for k, v in STORAGES.items() if v == dtype)
                raw = StorageRef(value["path_name"], storage, 0)
            except (KeyError, TypeError, StopIteration, AttributeError) as error:
                raise Refused(f"weight '{shown(key)}' is not described as expected") from error
            numbers = (offset, *shape, *stride)
            if value.get("use_pickle") or any(
                type(n) is not int or not 0 <= n < 2**40 for n in numbers
            ):
                raise Refused(f"weight '{shown(key)}' is a pickle or has an impossible shape")
            if len(shape) != len(stride) or len(shape) > 8:
                raise Refused(f"weight '{shown(key)}' has other strides than dimensions")
            found[key] = self.place(TensorRef(raw, offset, shape, stride))
        return found

    def locate(self, storage: str) -> str:
        folder = "data/weights" if self.kind == "torch.export" else "data"
        return f"{folder}/{storage}"

    def size(self, record: str) -> int:
        if record in self.arrays:
            return len(self.arrays[record])
        return self.infos[f"{self.root}/{record}"].file_size

    def where(self, record: str) -> tuple[int, int]:
        info = self.infos[f"{self.root}/{record}"]
        signature, name, extra = struct.unpack("<4s22xHH", self.source.span(info.header_offset, 30))
        if signature != b"PK\x03\x04":
            raise Refused(f"record '{shown(record)}' is not where the directory says")
        return info.header_offset + 30 + name + extra, info.file_size

    def verify(self) -> None:
        for name, info in self.infos.items():
            record = name.removeprefix(f"{self.root}/")
            if record.startswith("data") and info.compress_type == zipfile.ZIP_STORED:
                self._check_sum(record)

    def _check_sum(self, record: str) -> None:
        found, (start, size) = 0, self.where(record)
        for at in range(0, size, CHUNK):
            found = zlib.crc32(self.source.span(start + at, min(CHUNK, size - at)), found)
        if found != self.infos[f"{self.root}/{record}"].CRC:
            raise Refused(f"damaged (record '{shown(record)}' has another checksum)")


def flattened(content: Any) -> dict[str, Place]:
    """Flatten nested modules to a state dict with dotted keys.

    Raises:
        Refused: there are too many paths; modules that are shared can have any number.
    """
    found: dict[str, Place] = {}
    todo, looked = [("", content)], 0
    while todo:
        prefix, module = todo.pop()
        entries = module.items() if isinstance(module, dict) else ()
        looked += 1 + len(entries)
        if looked > 10 * MAX_TENSORS:
            raise Refused("too many parts of modules")
        for key, value in entries:
            if isinstance(value, (dict, Place)) and type(key) is str:
                if len(prefix) + len(key) > MAX_NAME:
                    raise Refused(f"a name of more than {MAX_NAME} letters")
                if isinstance(value, Place):
                    found[f"{prefix}{key}"] = value
                else:
                    todo.append((f"{prefix}{key}.", value))
    return found
