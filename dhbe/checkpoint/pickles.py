"""What a pickle describes, read as data: nothing in it is imported, called or built.

``pickletools`` splits the opcodes; the interpreter below replays them on plain values. Every
global stays a name. Only names on a list of harmless ones are accepted, because the purified file
keeps the rest of the pickle as it is and may be opened by a reader that does execute it.
"""

from __future__ import annotations

import io
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dhbe.errors import ArtefactError

MAX_OPCODES = 500_000
"""A tensor of a state dict takes about 30."""
MAX_KEY = 2**31
"""Larger integers as keys could be chosen to collide in a dict."""

HARMLESS = re.compile(
    r"""
    collections\.(OrderedDict|Counter|defaultdict)
    | builtins\.(dict|list|set|frozenset|tuple|int|float|bool|str|bytes|complex|slice|range)
    | __builtin__\.(dict|list|set|frozenset|tuple|int|long|float|bool|str|unicode|complex|slice)
    | _codecs\.encode | argparse\.Namespace | types\.SimpleNamespace
    | datetime\.(datetime|date|timedelta)
    | pathlib\.(Pure)?(Posix|Windows)?Path
    | torch\.(\w+Storage|Size|device|u?int\d+|b?float\d+\w*|double|half|long|short|bool|complex\d+)
    | torch\.storage\.(Typed|Untyped)Storage
    | torch\.(_utils\._rebuild_(tensor|tensor_v2|parameter)|nn\.parameter\.(Parameter|Buffer))
    | torch\.(serialization\._get_layout|_tensor\._rebuild_from_type_v2|Tensor|jit\._pickle\.\w+)
    | numpy\.(ndarray|dtype|bool_|u?int\d+|float\d+|dtypes\.\w+)
    | numpy\._?core\.multiarray\.(_reconstruct|scalar)
    | (pytorch_lightning|lightning\.pytorch|lightning_fabric|lightning\.fabric)
      \.utilities\.(parsing|data)\.AttributeDict
    | __torch__(\.\w+)*
    """,
    re.VERBOSE,
)
"""Names that may occur: containers, tensors, arrays, what training scripts keep beside weights."""

LITERAL = re.compile(
    r"(BIN)?INT[12]?|LONG[14]?|(BIN)?FLOAT|(SHORT_)?(BIN)?(STRING|UNICODE|BYTES)8?"
)
CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": list,
}
MARK = object()


class Global(NamedTuple):
    """The name of a class or function; never looked up."""

    name: str


@dataclass(eq=False)
class Opaque:
    """What a call would have made: who was named, with which arguments and state."""

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)


class StorageRef(NamedTuple):
    """A block of numbers beside the pickle: its record, torch's name of its type, its length."""

    record: str
    kind: str
    numel: int


class TensorRef(NamedTuple):
    """A tensor as the pickle describes it, in elements of its storage."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Refused(ArtefactError):
    """The content asks for more than holding data."""


def read_pickle(stream: io.BytesIO) -> Any:
    """The value that the pickle at the stream's position describes; the stream ends behind it.

    Tensors come as ``TensorRef``, calls as ``Opaque``, ordered dicts as dicts.

    Raises:
        Refused: damaged, too large, or naming a function or class that is not on the list.
    """
    machine = _Machine()
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count >= MAX_OPCODES:
                raise Refused(f"more than {MAX_OPCODES:,} pickle opcodes")
            machine.step(opcode.name, argument)
        return machine.stack.pop()
    except Refused:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise Refused(f"damaged pickle ({type(error).__name__}: {error})"[:300]) from error


class _Machine:
    """Stack and memo of the replay."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.actions = {o.name: self._action(o.name) for o in pickletools.opcodes}

    def step(self, name: str, argument: Any) -> None:
        action = self.actions[name]
        if action is None:
            raise Refused(f"pickle opcode {name}, which no checkpoint needs")
        action(argument)

    def _action(self, name: str) -> Callable[[Any], None] | None:
        """What an opcode does; None for those that are refused."""
        stack = self.stack
        if name in CONSTANTS:
            return lambda _: stack.append(CONSTANTS[name]())
        if LITERAL.fullmatch(name):
            return stack.append
        if name.endswith("PUT"):
            return lambda argument: self.memo.__setitem__(argument, stack[-1])
        if name.endswith("GET"):
            return lambda argument: stack.append(self.memo[argument])
        if name.startswith("TUPLE"):
            count = int(name[5:]) if name[5:] else None
            return lambda _: stack.append(tuple(self.pop(count)))
        found: Callable[[Any], None] | None = getattr(self, f"do_{name.lower()}", None)
        return found

    def do_proto(self, _: Any) -> None:
        """Nothing to do; nor for a frame, nor at the end."""

    do_frame = do_stop = do_proto

    def do_mark(self, _: Any) -> None:
        self.stack.append(MARK)

    def pop(self, count: int | None = None) -> list[Any]:
        """The last ``count`` values, or all behind the last mark."""
        if count is None:
            start = len(self.stack) - 1
            while self.stack[start] is not MARK:
                start -= 1
            found = self.stack[start + 1 :]
            del self.stack[start:]
            return found
        if len(self.stack) < count:
            raise ValueError("stack is empty")
        found = self.stack[-count:]
        del self.stack[-count:]
        return found

    def do_memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def do_pop(self, _: Any) -> None:
        self.stack.pop()

    def do_global(self, argument: str) -> None:
        name = argument.replace(" ", ".", 1)
        if not HARMLESS.fullmatch(name):
            raise Refused(
                f"the pickle names {name!r}, which a reader that trusts it would import and call; "
                "a state dict needs no such name"
            )
        self.stack.append(Global(name))

    def do_stack_global(self, _: Any) -> None:
        module, name = self.pop(2)
        self.do_global(f"{module} {name}")

    def do_reduce(self, _: Any) -> None:
        function, args = self.pop(2)
        if not isinstance(function, Global) or not isinstance(args, tuple):
            raise Refused("the pickle calls something that is not a name")
        self.stack.append(_call(function.name, args))

    do_newobj = do_reduce

    def do_newobj_ex(self, _: Any) -> None:
        self.pop(1)
        self.do_reduce(None)

    def do_build(self, _: Any) -> None:
        (state,) = self.pop(1)
        if isinstance(self.stack[-1], Opaque):
            self.stack[-1].state = state

    def do_binpersid(self, _: Any) -> None:
        (identity,) = self.pop(1)
        word, kind, record, _location, numel, *_view = identity
        if word not in ("storage", b"storage") or not isinstance(kind, Global):
            raise Refused("a persistent id that is not a storage")
        if type(numel) is not int or numel < 0:
            raise Refused(f"a storage of {numel} elements")
        self.stack.append(StorageRef(str(record), kind.name, numel))

    def do_append(self, _: Any) -> None:
        (value,) = self.pop(1)
        self._extend([value])

    def do_appends(self, _: Any) -> None:
        self._extend(self.pop())

    do_additems = do_appends

    def _extend(self, values: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(values)
        elif not isinstance(self.stack[-1], Opaque):
            raise ValueError("append to what is no list")

    def do_setitem(self, _: Any) -> None:
        self._update(self.pop(2))

    def do_setitems(self, _: Any) -> None:
        self._update(self.pop())

    def _update(self, flat: list[Any]) -> None:
        target = self.stack[-1]
        target = target.items if isinstance(target, Opaque) else target
        if not isinstance(target, dict):
            raise ValueError("set an item of what is no dict")
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            if not isinstance(key, (str, bytes, int, Opaque, type(None))):
                raise Refused(f"a dict key of type {type(key).__name__}")
            if isinstance(key, int) and abs(key) >= MAX_KEY:
                raise Refused("a dict key of more than 31 bits")
            if key in target:
                raise Refused(f"key {str(key)[:60]!r} occurs twice in one dict")
            target[key] = value


def _call(name: str, args: tuple[Any, ...]) -> Any:
    """What a call stands for, if it is one that checkpoints need; else an inert record."""
    if name in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
        storage, offset, shape, stride = args[:4]
        numbers = (offset, *shape, *stride)
        if not isinstance(storage, StorageRef) or len(shape) != len(stride) or len(shape) > 8:
            raise Refused("a tensor without a storage, or of more than 8 dimensions")
        if any(type(n) is not int or not 0 <= n < 2**40 for n in numbers):
            raise Refused(f"a tensor of shape {shape}, stride {stride}, offset {offset}"[:200])
        return TensorRef(storage, offset, tuple(shape), tuple(stride))
    if name == "torch._utils._rebuild_parameter" and isinstance(args[0], TensorRef):
        return args[0]
    if name == "collections.OrderedDict" and not args:
        return {}
    return Opaque(name, args)
