"""Convert a decoded pickle: tensors and arrays become places in the file, the rest plain values."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch

from dhbe.checkpoint.pickles import Opaque, Ordered, Refused, StorageRef, TensorRef
from dhbe.checkpoint.places import Place, contiguous

MAX_DEPTH = 100
SCRIPT = "__torch__"
KEPT = re.compile(
    r"argparse\.Namespace|types\.SimpleNamespace|int|key|numpy\._?core\.multiarray\.scalar"
    r"|(builtins|__builtin__)\.(set|frozenset|complex)|torch\.(Size|device)"
    r"|pathlib\.(Pure)?(Posix|Windows)?Path|collections\.(Counter|defaultdict|OrderedDict)"
)
"""What ``rebuilt.py`` makes again; other objects are not looked into."""
ARRAY = re.compile(r"numpy\._?core\.multiarray\._reconstruct")
ARRAY_TYPES = {
    **{"f2": torch.float16, "f4": torch.float32, "f8": torch.float64, "b1": torch.bool},
    **{"i1": torch.int8, "i2": torch.int16, "i4": torch.int32, "i8": torch.int64},
    "u1": torch.uint8,
}
"""Of numpy, as pickles name them."""


class Converter:
    """Convert tensor descriptions to places, once per object, however often it is referenced.

    Args:
        place: of a tensor that a pickle describes.
        room: bytes of the file, which all arrays together cannot exceed.
    """

    def __init__(self, place: Callable[[TensorRef], Any], room: int) -> None:
        self.place, self.room = place, room
        self.arrays: dict[str, bytes] = {}
        self._seen: dict[int, tuple[Any, Any]] = {}
        self._claimed = 0

    def value(self, value: Any, depth: int = 0) -> Any:
        """The converted value; one that holds itself or lies too deep is opaque."""
        if isinstance(value, TensorRef):
            return self.place(value)
        if isinstance(value, StorageRef) or not isinstance(value, (dict, list, tuple, Opaque)):
            return value
        if depth >= MAX_DEPTH:
            return Opaque(f"what lies deeper than {MAX_DEPTH}")
        if id(value) not in self._seen:
            self._seen[id(value)] = (value, Opaque("what holds itself"))
            self._seen[id(value)] = (value, self._made(value, depth + 1))
        return self._seen[id(value)][1]  # with the value, so that its number stays its own

    def _made(self, value: Any, depth: int) -> Any:
        if isinstance(value, Opaque):
            return self._opaque(value, depth)
        if isinstance(value, dict):
            inner = {k: self.value(v, depth) for k, v in value.items()}
            if not isinstance(value, Ordered):
                return inner
            made = Ordered(inner)
            made.state = self.value(value.state, depth)
            return made
        if type(value) in (list, tuple):
            return type(value)([self.value(v, depth) for v in value])
        return value

    def _opaque(self, value: Opaque, depth: int) -> Any:
        if value.name.startswith(SCRIPT):
            return self.value(value.state if isinstance(value.state, dict) else {}, depth)
        if ARRAY.fullmatch(value.name):
            return self._array(value)
        if KEPT.fullmatch(value.name):
            parts = (value.args, value.state, value.items)
            return Opaque(value.name, *(self.value(p, depth) for p in parts))
        if value.items is not None:  # a class of dicts
            return self.value(value.items, depth)
        return value

    def _array(self, value: Opaque) -> Any:
        """The array's place; the value itself where its type is none of torch's.

        Raises:
            Refused: its shape and data disagree, or all arrays are larger than the file.
        """
        state = value.state if type(value.state) is tuple and len(value.state) == 5 else (None,) * 5
        _, shape, dtype, fortran, raw = state
        kind = number_type(dtype)
        if kind is None or type(raw) is not bytes or type(shape) is not tuple or len(shape) > 8:
            return value
        if any(type(n) is not int or not 0 <= n < 2**40 for n in shape):
            raise Refused("an array of an impossible shape")
        if math.prod(shape) * kind.itemsize != len(raw):
            raise Refused("an array whose shape and data disagree")
        self._claimed += len(raw)
        if self._claimed > 2 * self.room:
            raise Refused("arrays that claim more than the file holds")
        record = f"array {len(self.arrays)}"
        self.arrays[record] = raw
        stride = contiguous(shape[::-1])[::-1] if fortran is True else contiguous(shape)
        return Place(record, kind, 0, shape, stride)


def number_type(dtype: Any) -> torch.dtype | None:
    """Of a numpy type as a pickle describes it; None for those that torch does not have."""
    if not isinstance(dtype, Opaque) or dtype.name != "numpy.dtype" or not dtype.args:
        return None
    order = dtype.state[1] if type(dtype.state) is tuple and len(dtype.state) > 1 else "<"
    known = type(dtype.args[0]) is str and order in ("<", "|", "=")
    return ARRAY_TYPES.get(dtype.args[0]) if known else None
