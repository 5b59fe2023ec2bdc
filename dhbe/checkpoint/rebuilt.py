"""Write back: a new file built only from the decoded content of the old one.

No byte of the input's pickle, header or directory is copied. Containers, numbers, texts, tensors
and a few harmless objects are made again and written by torch's or safetensors' own writers; the
rest is left out and listed. So whatever the input held, a reader that trusts the output executes
nothing of it.
"""

from __future__ import annotations

import argparse
import pickle
import pickletools
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from dhbe.checkpoint.contents import number_type
from dhbe.checkpoint.kinds import is_tar
from dhbe.checkpoint.pickles import Global, Opaque, Ordered, Refused, shown
from dhbe.checkpoint.places import Place

SUFFIXES = (".pt", ".pth", ".th", ".ckpt", ".bin", ".pkl", ".model")
"""Of files of torch.save; others get ``.pt``."""
PADDING = "padding"
MAX_LISTED = 8
MAX_KEYS = 1000
"""Wide integers in one container, whose hashes can be chosen to collide."""
OPCODES = {ord(o.code) for o in pickletools.opcodes}
NAMESPACES = {
    "argparse.Namespace": argparse.Namespace,
    "types.SimpleNamespace": types.SimpleNamespace,
}
DTYPES = {
    f"torch.{n}": getattr(torch, n)
    for n in dir(torch)
    if isinstance(getattr(torch, n), torch.dtype)
}
DROPPED = object()


class Rebuilder:
    """Makes plain values again from a file's content.

    Args:
        tensor: the tensor of a place, with its new numbers.

    Attributes:
        dropped: path -> what was left out there.
    """

    def __init__(self, tensor: Callable[[Place], Any]) -> None:
        self.tensor = tensor
        self.dropped: dict[str, str] = {}
        self._made: dict[int, tuple[Any, Any]] = {}
        self._path: list[str] = []

    def value(self, value: Any) -> Any:
        """Rebuild a value, once per object; ``DROPPED`` if its type is not on the list."""
        if isinstance(value, Place):
            return self.tensor(value)
        if value is None or type(value) in (bool, int, float, str, bytes):
            return value
        if id(value) not in self._made:
            self._made[id(value)] = (value, self._new(value))
        made = self._made[id(value)][1]
        if made is DROPPED and len(self.dropped) < 1000:
            named = getattr(value, "name", type(value).__name__)
            self.dropped[".".join(self._path)] = shown(named)
        return made

    def _new(self, value: Any) -> Any:
        if isinstance(value, dict):
            made = self._dict(value)
            if isinstance(value, Ordered):
                made = OrderedDict(made)
                about = value.state.get("_metadata") if isinstance(value.state, dict) else None
                if isinstance(about, dict):  # versions of layers, which load_state_dict reads
                    made._metadata = OrderedDict(self._dict(about))  # type: ignore[attr-defined]
            return made
        if type(value) in (list, tuple):
            inner = [self._at(str(i), v) for i, v in enumerate(value)]
            return type(value)([None if v is DROPPED else v for v in inner])
        if isinstance(value, Global):
            return DTYPES.get(value.name, DROPPED)
        return self._object(value) if isinstance(value, Opaque) else DROPPED

    def _at(self, key: str, value: Any) -> Any:
        self._path.append(shown(key, 40))
        made = self.value(value)
        self._path.pop()
        return made

    def _dict(self, value: Mapping[Any, Any]) -> dict[Any, Any]:
        made: dict[Any, Any] = {}
        wide = 0
        for key, inner in value.items():
            wide += isinstance(key, Opaque) and key.name in ("int", "key")
            named = key if isinstance(key, str) else shown(key)
            new_key = self._at(named, key)
            if wide > MAX_KEYS or not isinstance(new_key, (*SCALARS, tuple)):
                new_key = DROPPED
                self.dropped[".".join([*self._path, "(a key)"])] = named
            new = DROPPED if new_key is DROPPED else self._at(named, inner)
            if new is not DROPPED:
                made[new_key] = new
        return made

    def _object(self, value: Opaque) -> Any:
        """One of the harmless objects."""
        last = value.name.rpartition(".")[2]
        if value.name in ("int", "key"):
            return self._key(value)
        if value.name in NAMESPACES:
            return self._namespace(value)
        if last == "scalar":
            return _scalar(value.args)
        if value.name in ("collections.Counter", "collections.defaultdict"):
            held = [a for a in value.args if isinstance(a, dict)]
            return self._dict(value.items or (held[0] if held else {}))
        if value.name.startswith("pathlib.") and all(type(p) is str for p in value.args):
            return "/".join(value.args).replace("//", "/")
        if value.name == "torch.Size" and len(value.args) == 1 and _numbers(value.args[0]):
            return torch.Size(value.args[0])
        if value.name == "torch.device":
            return _device(value.args)
        if last == "complex" and len(value.args) == 2 and _numbers(value.args, (int, float)):
            return complex(*value.args)
        if last in ("set", "frozenset") and len(value.args) <= 1:
            return self._set(value, set if last == "set" else frozenset)
        return DROPPED

    def _namespace(self, value: Opaque) -> Any:
        state = value.state if isinstance(value.state, dict) else {}
        plain = {k: v for k, v in state.items() if type(k) is str and not k.startswith("__")}
        return NAMESPACES[value.name](**self._dict(plain))

    def _key(self, value: Opaque) -> Any:
        """A wide integer, or a number or tuple as a key."""
        (inner,) = value.args
        if value.name == "int" or type(inner) is float:
            return inner
        flat = type(inner) is tuple and len(inner) <= 8
        return inner if flat and all(type(v) in (str, int, float, bool) for v in inner) else DROPPED

    def _set(self, value: Opaque, kind: type) -> Any:
        members = value.args[0] if value.args else []
        if type(members) not in (list, tuple):
            return DROPPED
        return kind(members) if all(type(v) in (str, int, bytes) for v in members) else DROPPED


SCALARS = (type(None), bool, int, float, str, bytes, np.generic)


def _numbers(value: Any, kinds: tuple[type, ...] = (int,)) -> bool:
    return type(value) is tuple and len(value) <= 8 and all(type(v) in kinds for v in value)


def _scalar(args: tuple[Any, ...]) -> Any:
    """A number of numpy."""
    kind = number_type(args[0]) if len(args) == 2 else None
    if kind is None or type(args[1]) is not bytes or len(args[1]) != kind.itemsize:
        return DROPPED
    return np.frombuffer(args[1], args[0].args[0])[0]


def _device(args: tuple[Any, ...]) -> Any:
    """A device; its index, if any, is small."""
    if not args or args[0] not in ("cpu", "cuda", "mps") or len(args) > 2:
        return DROPPED
    index = args[1:] if type(args[-1]) is int and 0 <= args[-1] < 64 else ()
    return torch.device(args[0], *index)


def suffix_of(name: str, safetensors: bool) -> tuple[str, str]:
    """Stem and suffix of the purified file: what it is, whatever the input was called."""
    path = Path(name)
    stem = path
    for _ in range(2):  # model_best.pth.tar
        if stem.suffix.lower() in (*SUFFIXES, ".tar", ".safetensors", ".pt2"):
            path, stem = stem, stem.with_suffix("")
    if safetensors:
        return stem.name, ".safetensors"
    return stem.name, path.suffix if path.suffix.lower() in SUFFIXES else ".pt"


def write_safetensors(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], target: Path
) -> None:
    """Write tensors of any shape as safetensors; the header is padded to be unambiguous.

    Its length comes first and can be the opcodes of a pickle that goes on in names and numbers;
    the names can be the header of a tar archive.

    Raises:
        Refused: no padding helps.
    """
    held = {k: v.contiguous() for k, v in tensors.items()}
    for room in range(0, 256, 8):
        padding = {PADDING: " " * room} if room else {}
        save_file(held, target, {**metadata, **padding} or None)
        if not mistaken(target):
            return
    target.unlink()
    raise Refused("a file that other readers would take for another format; not written")


def write_torch(content: Any, target: Path, *, legacy: bool) -> None:
    """By ``torch.save``.

    Raises:
        Refused: other readers would take it for another format, or it is nested too deeply.
    """
    try:
        with target.open("wb") as file:
            torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    except (RecursionError, pickle.PicklingError, OverflowError) as error:
        target.unlink()
        raise Refused(f"cannot be written back ({shown(error, 100)})") from error
    if legacy and mistaken(target, magic=True):
        target.unlink()
        raise Refused("a file that other readers would take for another format; not written")


def mistaken(file: Path, magic: bool = False) -> bool:
    """Whether a reader of pickles, tar or zip archives would take a file for one of these.

    Args:
        magic: it is a file of torch's old format, which begins with a pickle of one number.
    """
    with file.open("rb") as stream:
        head = stream.read(512)
    return (
        (head[0] in OPCODES and not magic)
        or head.startswith(b"PK")
        or is_tar(head)
        or zipfile.is_zipfile(file)
    )
