"""What a pickle describes, read as data: nothing in it is imported, called or built.

``pickletools`` splits the opcodes; the interpreter below replays them on plain values. Every
global stays a name. Only names on a list of harmless ones are accepted, because the purified file
keeps the rest of the pickle as it is and may be opened by a reader that does execute it.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dhbe.core.errors import ArtefactError

MAX_OPCODES = 2_000_000
"""A tensor of a state dict takes about 30, a poisoned image that BackdoorBench lists 28."""
MAX_KEY = 2**31
"""Larger integers as keys could be chosen to collide in a dict."""

HARMLESS = re.compile(
    r"""
    collections\.(OrderedDict|Counter|defaultdict)
    | (builtins|__builtin__)\.(dict|list|set|frozenset|tuple|bytes)
    | (builtins|__builtin__)\.(int|long|float|bool|str|unicode|complex)
    | _codecs\.encode | argparse\.Namespace | types\.SimpleNamespace
    | datetime\.(datetime|date|timedelta)
    | pathlib\.(Pure)?(Posix|Windows)?Path
    | torch\.(\w+Storage|Size|device|u?int\d+|b?float\d+\w*|double|half|long|short|bool|complex\d+)
    | torch\.storage\.(Typed|Untyped)Storage
    | torch\.(_utils\._rebuild_(tensor|tensor_v2|parameter)|nn\.parameter\.(Parameter|Buffer))
    | torch\.(serialization\._get_layout|_tensor\._rebuild_from_type_v2|Tensor)
    | torch\.jit\._pickle\.(build_(int|double|bool|tensor)list|restore_type_tag)
    | numpy\.(ndarray|dtype|bool_|u?int\d+|float\d+|dtypes\.[A-Z]\w*DType)
    | numpy\._?core\.multiarray\.(_reconstruct|scalar)
    | (pytorch_lightning|lightning\.pytorch|lightning_fabric|lightning\.fabric)
      \.utilities\.(parsing|data)\.AttributeDict
    | __torch__(\.\w+)*
    """,
    re.VERBOSE | re.ASCII,
)
"""Names that may occur: containers, tensors, arrays, what training scripts keep beside weights."""
NEVER_CALLED = re.compile(r"torch\.(\w*Storage|storage\.\w+|Tensor)|numpy\.ndarray")
"""Names that stand for a type; called with a number they would allocate as much."""
PLAIN = re.compile(r"(builtins|__builtin__|collections)\.\w+")
"""Containers; made from a number they would be as large."""
NUMBERS = ("int", "long", "float", "bool", "complex", "str", "unicode")
TENSOR_MAKERS = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter")
TUPLE_STATE = re.compile(r"numpy\.(dtype|_?core\.multiarray\._reconstruct)|numpy\.dtypes\.\w+")
"""Objects whose state is a tuple by design; elsewhere a tuple would set attributes of any name."""

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
        raise Refused(f"damaged pickle ({type(error).__name__}: {shown(error, 250)})") from error


def shown(text: object, most: int = 60) -> str:
    """What a file calls something, fit for a terminal: short, control characters escaped.

    Args:
        text: a string, or an exception; a container could be as large as it likes.
    """
    return ascii(str(text)[:most])[1:-1]


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
                f"the pickle names '{shown(name)}', which a reader that trusts it would import and "
                "call; a state dict needs no such name"
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
        target = self.stack[-1]
        named = target.name if isinstance(target, Opaque) else ""
        plain = isinstance(state, dict) and all(
            isinstance(k, str) and not k.startswith("__") for k in state
        )
        by_design = isinstance(state, tuple) and TUPLE_STATE.fullmatch(named) and _fits(state)
        if isinstance(target, Global) or not (plain or by_design or named.startswith("__torch__")):
            raise Refused("the pickle sets attributes that no checkpoint needs")
        if isinstance(target, Opaque):
            target.state = state

    def do_binpersid(self, _: Any) -> None:
        (identity,) = self.pop(1)
        word, kind, record, _location, numel, *_view = identity
        if word not in ("storage", b"storage") or not isinstance(kind, Global):
            raise Refused("a persistent id that is not a storage")
        if type(record) is int:
            record = str(record)
        if type(numel) is not int or numel < 0 or type(record) is not str:
            raise Refused("a storage without a name or with an impossible length")
        self.stack.append(StorageRef(record, kind.name, numel))

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
                raise Refused(f"key {shown_key(key)} occurs twice in one dict")
            target[key] = value


def _call(name: str, args: tuple[Any, ...]) -> Any:
    """What a call stands for, if it is one that checkpoints need; else an inert record.

    Raises:
        Refused: done for real, the call could allocate any amount of memory, or call another name.
    """
    last = name.rpartition(".")[2]
    if last in ("_rebuild_tensor_v2", "_rebuild_tensor"):
        return _tensor(args)
    if last == "_rebuild_parameter" and isinstance(args[0], TensorRef):
        return args[0]
    if name == "collections.OrderedDict" and (not args or isinstance(args[0], list)):
        return _ordered(args[0] if args else [])
    by_number = PLAIN.fullmatch(name) and any(isinstance(a, (int, float)) for a in args)
    maker = args[0].name if args and isinstance(args[0], Global) else ""
    if (
        NEVER_CALLED.fullmatch(name)
        or (by_number and last not in NUMBERS)
        or (last == "_reconstruct" and args[1] != (0,))
        or (name == "_codecs.encode" and args[1:] != ("latin1",))
        or (last == "_rebuild_from_type_v2" and maker not in TENSOR_MAKERS)
    ):
        raise Refused(f"the pickle calls {name} in a way that no checkpoint needs")
    return Opaque(name, args)


def _tensor(args: tuple[Any, ...]) -> TensorRef:
    storage, offset, shape, stride = args[:4]
    if not isinstance(storage, StorageRef) or len(shape) != len(stride) or len(shape) > 8:
        raise Refused("a tensor without a storage, or of more than 8 dimensions")
    numbers = (offset, *shape, *stride)
    if any(type(n) is not int for n in numbers):
        raise Refused("a tensor whose shape, stride or offset is not made of integers")
    if any(not 0 <= n < 2**40 for n in numbers):
        raise Refused(f"a tensor of shape {shape}, stride {stride}, offset {offset}"[:200])
    return TensorRef(storage, offset, tuple(shape), tuple(stride))


def _ordered(pairs: list[Any]) -> dict[str, Any]:
    """An ordered dict made from pairs, as Python 2 wrote it."""
    made: dict[str, Any] = {}
    for key, value in pairs:
        if type(key) is not str or key in made:
            raise Refused("an ordered dict with a key that is no text, or occurs twice")
        made[key] = value
    return made


def _fits(state: tuple[Any, ...]) -> bool:
    """Whether an array's state (.., shape, type, order, data) holds as much as its shape says."""
    shape, data = (state[-4], state[-1]) if len(state) >= 4 else ((), b"")
    data = data.args[0] if isinstance(data, Opaque) else data
    if not isinstance(shape, tuple) or not isinstance(data, (bytes, str, list)):
        return not isinstance(shape, tuple)  # the state of a type, not of an array
    return all(type(n) is int and n >= 0 for n in shape) and math.prod(shape) <= len(data)


def shown_key(key: object) -> str:
    """A dict's key in a message; only text is quoted."""
    return f"'{shown(key)}'" if isinstance(key, str) else f"of type {type(key).__name__}"
