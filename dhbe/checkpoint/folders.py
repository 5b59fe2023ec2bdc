"""Folders of weights, and numpy arrays: what is not one file of tensors, read as if it were.

Neither is written back in its own form: the purified weights come as one safetensors file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dhbe.checkpoint.files import MAX_HEADER, Place, WeightFile, open_weights, parse_json
from dhbe.checkpoint.pickles import Opaque, Refused, shown

NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin")
"""Of Hugging Face folders, first choice first; with ``.index.json`` behind it a list of parts."""
WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".tar", ".th")
MAX_PARTS = 100
RECONSTRUCT = "multiarray._reconstruct"
ARRAY_TYPES = {
    f"{kind}{size}" for kind, sizes in (("f", "248"), ("i", "1248"), ("u", "1")) for size in sizes
}
"""Of numpy arrays, as dtypes name them."""


class Joined(WeightFile):
    """Several files of one network, or one file in a folder that describes it."""

    program = True  # written as plain safetensors
    kind = "folder"

    def __init__(self, path: Path, parts: list[WeightFile], about: dict[str, Any]) -> None:
        super().__init__(path)
        self.parts = parts
        weights: dict[str, Place] = {}
        for number, part in enumerate(parts):
            found = part.content if isinstance(part.content, dict) else {}
            tensors = {k: p for k, p in found.items() if isinstance(p, Place)}
            if weights.keys() & tensors.keys():
                raise Refused("two parts of the folder hold the same weight")
            weights |= {k: p._replace(record=f"{number}/{p.record}") for k, p in tensors.items()}
            self.metadata |= part.metadata
        self.content = about | {"state_dict": weights}

    def _part(self, record: str) -> tuple[WeightFile, str]:
        number, _, inner = record.partition("/")
        return self.parts[int(number)], inner

    def size(self, record: str) -> int:
        part, inner = self._part(record)
        return part.size(inner)

    def read(self, record: str) -> bytearray:
        part, inner = self._part(record)
        return part.read(inner)

    def write(self, target: Path, records: Mapping[str, bytes]) -> None:
        raise NotImplementedError("a folder is written as one safetensors file")


class Arrays(WeightFile):
    """A file whose weights are numpy arrays inside its pickle."""

    program = True
    kind = "numpy arrays"

    def __init__(self, file: WeightFile) -> None:
        super().__init__(file.path)
        self.metadata = file.metadata
        self.held: dict[str, bytes] = {}
        self.content = self._converted(file.content, 0)

    def _converted(self, value: Any, depth: int) -> Any:
        if is_array(value):
            return self._array(value)
        if isinstance(value, dict) and depth < 3:
            return {k: self._converted(v, depth + 1) for k, v in value.items()}
        return value

    def _array(self, value: Opaque) -> Any:
        """The array's place; the value itself where it is of another type."""
        _, shape, dtype, fortran, data = value.state
        raw = data.args[0].encode("latin1") if isinstance(data, Opaque) else data
        kind = str(dtype.args[0]) if isinstance(dtype, Opaque) and dtype.args else ""
        order = dtype.state[1] if isinstance(dtype, Opaque) and dtype.state else "<"
        if kind not in ARRAY_TYPES or order == ">" or not isinstance(raw, bytes):
            return value
        array = np.frombuffer(raw, kind)
        if array.size != math.prod(shape):
            raise Refused("an array whose shape and data disagree")
        array = np.ascontiguousarray(array.reshape(shape, order="F" if fortran else "C"))
        record = f"array {len(self.held)}"
        self.held[record] = array.tobytes()
        stride = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        torch_type = torch.from_numpy(array[:0] if array.ndim else array.reshape(1)).dtype
        return Place(record, torch_type, 0, tuple(shape), tuple(stride))

    def size(self, record: str) -> int:
        return len(self.held[record])

    def read(self, record: str) -> bytearray:
        return bytearray(self.held[record])

    def write(self, target: Path, records: Mapping[str, bytes]) -> None:
        raise NotImplementedError("arrays are written as a safetensors file")


def opened(path: Path) -> WeightFile:
    """A file of weights, or a folder of them.

    Raises:
        Refused: it is neither, or of a kind that has to be converted first; says how.
    """
    if path.is_dir():
        return open_folder(path)
    file = open_weights(path)
    return Arrays(file) if has_arrays(file.content) else file


def open_folder(path: Path) -> WeightFile:
    """A folder as Hugging Face hubs hold it.

    Raises:
        Refused: of another kind; names the files in it that may be meant.
    """
    about = described(path)
    for name in NAMES:
        if (path / name).is_file():
            return Joined(path, [open_weights(path / name)], about)
        index = path / f"{name}.index.json"
        if index.is_file():
            return Joined(path, [open_weights(path / part) for part in parts_of(index)], about)
    if (path / ".metadata").is_file():
        raise Refused(
            "a distributed checkpoint of several files; make one of it: python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {path} weights.pt (which "
            "unpickles .metadata: only for folders that you trust)"
        )
    files = sorted(f.name for f in path.iterdir() if f.suffix in WEIGHTS)[:8]
    named = (
        f"name one of its files: {', '.join(map(shown, files))}" if files else "no weights in it"
    )
    raise Refused(f"a folder, but not as Hugging Face hubs hold it; {named}")


def parts_of(index: Path) -> list[str]:
    """Files that an index lists, beside it.

    Raises:
        Refused: it lists others, or too many.
    """
    names = sorted(set(json_of(index).get("weight_map", {}).values()), key=str)
    if not 0 < len(names) <= MAX_PARTS or any(Path(str(n)).name != n for n in names):
        raise Refused(f"'{index.name}' lists no files, too many, or files elsewhere")
    if missing := [n for n in names if not (index.parent / n).is_file()]:
        raise Refused(f"'{shown(missing[0])}' is missing, which '{index.name}' lists")
    return names


def described(path: Path) -> dict[str, Any]:
    """What ``config.json`` and ``preprocessor_config.json`` say, in the words of checkpoints."""
    about: dict[str, Any] = {}
    for name in ("config.json", "preprocessor_config.json"):
        if (path / name).is_file():
            about |= json_of(path / name)
    size = about.pop("size", None)
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    labels = about.get("id2label")
    more = {
        "image_size": about.get("image_size") or size,
        "num_classes": about.get("num_classes") or (len(labels) if labels else None),
        "mean": about.get("image_mean"),
        "std": about.get("image_std"),
    }
    return about | {k: v for k, v in more.items() if v is not None}


def json_of(file: Path) -> dict[str, Any]:
    """A small JSON object.

    Raises:
        Refused: it is none, or large.
    """
    if file.stat().st_size > MAX_HEADER:
        raise Refused(f"'{file.name}' of more than {MAX_HEADER:,} bytes")
    return parse_json(file.read_bytes())


def is_array(value: Any) -> bool:
    """Whether a value of a pickle is a numpy array."""
    return (
        isinstance(value, Opaque)
        and value.name.endswith(RECONSTRUCT)
        and isinstance(value.state, tuple)
        and len(value.state) == 5
    )


def has_arrays(content: Any, depth: int = 0) -> bool:
    """Whether a state dict of arrays lies on top of a content, or up to two keys below."""
    if not isinstance(content, dict) or depth > 2:
        return False
    arrays = sum(is_array(v) for v in content.values())
    if arrays and 2 * arrays > len(content):
        return True
    return any(has_arrays(v, depth + 1) for v in content.values())


def bytes_of(path: Path) -> int:
    """Size of a file, or of all files in a folder."""
    if path.is_dir():
        return sum(f.stat().st_size for f in path.iterdir() if f.is_file())
    return path.stat().st_size
