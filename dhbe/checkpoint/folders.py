"""Folders of weights, as Hugging Face hubs hold them: read as if they were one file.

They are not written back in their own form: the purified weights come as one safetensors file.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from dhbe.checkpoint.files import MAX_HEADER, Place, WeightFile, open_weights, parse_json
from dhbe.checkpoint.pickles import Refused, shown

NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin")
"""Of Hugging Face folders, first choice first; with ``.index.json`` behind it a list of parts."""
WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".tar", ".th")
MAX_PARTS = 100


class Joined(WeightFile):
    """Several files of one network, or one file in a folder that describes it."""

    program = True  # written as plain safetensors
    kind = "folder"

    def __init__(self, path: Path, parts: list[WeightFile], about: dict[str, Any]) -> None:
        super().__init__(path, parts[0].source)
        self.parts, self.about = parts, about
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

    def where(self, record: str) -> tuple[int, int]:
        part, inner = self._part(record)
        return part.where(inner)

    def size(self, record: str) -> int:
        part, inner = self._part(record)
        return part.size(inner)

    def part(self, record: str, start: int, length: int) -> bytearray:
        part, inner = self._part(record)
        return part.part(inner, start, length)

    def digest(self) -> str:
        """SHA-256 of what the folder says and of its parts' hashes."""
        found = hashlib.sha256(repr(sorted(self.about.items())).encode())
        for part in self.parts:
            found.update(part.digest().encode())
        return found.hexdigest()

    def verify(self) -> None:
        for part in self.parts:
            part.verify()


def opened(path: Path) -> WeightFile:
    """A file of weights, or a folder of them.

    Raises:
        Refused: it is neither, or of a kind that has to be converted first; says how.
    """
    if path.is_dir():
        return open_folder(path)
    return open_weights(path)


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


def bytes_of(path: Path) -> int:
    """Size of a file, or of all files in a folder."""
    if path.is_dir():
        return sum(f.stat().st_size for f in path.iterdir() if f.is_file())
    return path.stat().st_size
