"""Decode a pickle as data: nothing in it is imported, called or instantiated.

``pickletools`` splits the opcodes; the machine below replays them on plain values. Every global
stays a name, every call a record. Names are free, because a purified file is made anew from the
plain values alone; those that run code in a reader that trusts them are refused by name, so that
their user learns of them.
"""

from __future__ import annotations

import io
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from dhbe.core.errors import ArtefactError

MAX_WORK = 1_000_000
"""Opcodes and values moved. A tensor of a state dict takes about 30, a poisoned image that
BackdoorBench lists 28."""
BYTES_PER_WORK = 64
MAX_NAME = 300
"""Letters of a global."""
MAX_BITS = 64
"""Wider integers come as ``Opaque``: text and hashes of them can take any time."""

RUNS_CODE = re.compile(
    r"""
    (os|posix|nt|subprocess|sys|shutil|socket|ctypes|pty|runpy|importlib|imp|code|codeop|commands
     |pickle|_pickle|cPickle|marshal|webbrowser|multiprocessing|asyncio|pip|pdb|timeit|gc|atexit
     |signal|threading|_thread|site|pkgutil|zipimport|cffi)(\..+)?
    | (builtins|__builtin__)\.(eval|exec|execfile|compile|open|file|input|breakpoint|__import__
      |getattr|setattr|delattr|globals|locals|vars|apply|__dict__)(\..+)?
    | types\.(FunctionType|CodeType|LambdaType|MethodType) | operator\.(attrgetter|methodcaller)
    | torch\.(load|hub\..+|serialization\.load|utils\.cpp_extension\..+|_C\..+|ops\..+)
    | numpy\.(load|.*runstring|testing\..+) | joblib\.load | dill\..+ | cloudpickle\..+
    """,
    re.VERBOSE,
)
"""A diagnosis, not the defence: what is on no list is as inert."""
TENSOR_MAKERS = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")
LITERAL = re.compile(r"(BIN)?INT[12]?|(BIN)?FLOAT|(SHORT_)?(BIN)?(STRING|UNICODE|BYTES)8?")
CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": lambda: Opaque("builtins.set", ([],)),
}
MARK = object()


class Global(NamedTuple):
    """The name of a class or function; never looked up."""

    name: str


@dataclass(eq=False, slots=True)
class Opaque:
    """Inert record of a call: callable's name, arguments, state and items."""

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] | None = None


class Ordered(dict[Any, Any]):
    """An ordered dict; ``state`` holds its attributes, as the ``_metadata`` of a state dict."""

    state: Any = None


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
    """The pickle contains something other than data."""


def read_pickle(stream: io.BytesIO) -> Any:
    """The value that the pickle at the stream's position describes; the stream ends behind it.

    Tensors come as ``TensorRef``, calls as ``Opaque``, ordered dicts as ``Ordered``.

    Raises:
        Refused: damaged, too much work, or naming what runs code.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            machine.step(opcode.name, argument)
        return machine.stack.pop()
    except Refused:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise Refused(f"damaged pickle ({type(error).__name__}: {shown(error, 120)})") from error


def shown(text: object, most: int = 60) -> str:
    """Text from a file, shortened and with control characters escaped for terminals.

    Args:
        text: a string or an exception; of anything else only the type is told.
    """
    if isinstance(text, (str, BaseException)) or (type(text) is int and text.bit_length() < 999):
        return ascii(str(text)[:most])[1:-1] if not isinstance(text, int) else str(text)[:most]
    return f"({type(text).__name__})"


class _Machine:
    """Stack and memo of the replay."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.work = 0
        self.actions = {o.name: self._action(o.name) for o in pickletools.opcodes}

    def step(self, name: str, argument: Any) -> None:
        self.spend(1)
        action = self.actions[name]
        if action is None:
            raise Refused(f"pickle opcode {name}, which no checkpoint needs")
        action(argument)

    def spend(self, work: int) -> None:
        """Count what an opcode moves."""
        self.work += work
        if self.work > MAX_WORK:
            raise Refused(f"a pickle that takes more than {MAX_WORK:,} steps")

    def _action(self, name: str) -> Callable[[Any], None] | None:
        """Handler of an opcode; None for refused ones."""
        stack = self.stack
        if name in CONSTANTS:
            return lambda _: stack.append(CONSTANTS[name]())
        if name in ("INT", "LONG", "LONG1", "LONG4"):
            return lambda argument: stack.append(_integer(argument))
        if LITERAL.fullmatch(name):
            return stack.append
        if name == "BYTEARRAY8":
            return lambda argument: stack.append(bytes(argument))
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
        if len(argument) > MAX_NAME:
            raise Refused(f"a name of more than {MAX_NAME} letters")
        name = argument.replace(" ", ".", 1)
        if RUNS_CODE.fullmatch(name):
            raise Refused(
                f"the pickle names '{shown(name)}', which runs code in a reader that trusts it; do "
                "not open this file with torch.load(weights_only=False)"
            )
        self.stack.append(Global(name))

    def do_stack_global(self, _: Any) -> None:
        module, name = self.pop(2)
        if type(module) is not str or type(name) is not str or len(module) > MAX_NAME:
            raise Refused("a global whose name is no short text")
        self.do_global(f"{module} {name[: MAX_NAME + 1]}")

    def do_reduce(self, _: Any) -> None:
        function, args = self.pop(2)
        if not isinstance(function, Global) or type(args) is not tuple:
            raise Refused("the pickle calls something that is not a name")
        self.stack.append(self._call(function.name, args))

    do_newobj = do_reduce

    def do_newobj_ex(self, _: Any) -> None:
        self.pop(1)
        self.do_reduce(None)

    def do_build(self, _: Any) -> None:
        (state,) = self.pop(1)
        target = self.stack[-1]
        if isinstance(target, Global):
            raise Refused("the pickle sets attributes of a class")
        if isinstance(target, (Opaque, Ordered)):
            target.state = state

    def do_frozenset(self, _: Any) -> None:
        self.stack.append(Opaque("builtins.frozenset", (self.pop(),)))

    def do_binpersid(self, _: Any) -> None:
        (identity,) = self.pop(1)
        if type(identity) is not tuple or not 5 <= len(identity) <= 6:
            if type(identity) is tuple and len(identity) == 4 and identity[0] == "module":
                self.stack.append(identity[1])  # a class and its source, before torch 1.6
                return
            raise Refused("a persistent id that is not a storage")
        word, kind, record, _location, numel, *view = identity
        if word != "storage" or not isinstance(kind, Global) or view not in ([], [None]):
            raise Refused("a persistent id that is not a plain storage")
        record = str(record) if type(record) is int else record
        if type(numel) is not int or numel < 0 or type(record) is not str:
            raise Refused("a storage without a name or with an impossible length")
        self.stack.append(StorageRef(record, kind.name, numel))

    def do_append(self, _: Any) -> None:
        self._extend(self.pop(1))

    def do_appends(self, _: Any) -> None:
        self._extend(self.pop())

    do_additems = do_appends

    def _extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Opaque):
            if target.name != "builtins.set":
                return  # of a class that is dropped
            target = target.args[0] if target.args else None
        if type(target) is not list:
            raise ValueError("append to what is no list")
        target.extend(values)

    def do_setitem(self, _: Any) -> None:
        self._update(self.pop(2))

    def do_setitems(self, _: Any) -> None:
        self._update(self.pop())

    def _update(self, flat: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Opaque):
            target.items = {} if target.items is None else target.items
            target = target.items
        if not isinstance(target, dict):
            raise ValueError("set an item of what is no dict")
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            _put(target, key, value)

    def _call(self, name: str, args: tuple[Any, ...]) -> Any:
        """What a call stands for, if it is one that checkpoints need; else an inert record."""
        last = name.rpartition(".")[2]
        if last == "_rebuild_from_type_v2" and len(args) == 4 and isinstance(args[0], Global):
            name, args = args[0].name, args[2]
            last = name.rpartition(".")[2]
        if not isinstance(args, tuple):
            raise Refused("a call without arguments")
        if name in TENSOR_MAKERS:
            return _tensor(args)
        if last.startswith("_rebuild_parameter") and args and isinstance(args[0], TensorRef):
            return args[0]
        if name == "collections.OrderedDict" and (not args or type(args[0]) is list):
            return self._ordered(args[0] if args else [])
        if name == "_codecs.encode" and args[1:] == ("latin1",) and type(args[0]) is str:
            self.spend(len(args[0]) // BYTES_PER_WORK)
            return args[0].encode("latin1")
        return Opaque(name, args)

    def _ordered(self, pairs: list[Any]) -> Ordered:
        """An ordered dict made from pairs, as Python 2 wrote it."""
        self.spend(len(pairs))
        made = Ordered()
        for pair in pairs:
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise Refused("an ordered dict of something else than pairs")
            _put(made, *pair)
        return made


def _put(target: dict[Any, Any], key: Any, value: Any) -> None:
    """Set an item; keys whose hash can be chosen or take long go in as ``Opaque``."""
    if not isinstance(key, (str, bytes, int, Opaque, type(None))):
        key = Opaque("key", (key,))
    if key in target:
        named = f"'{shown(key)}'" if isinstance(key, str) else f"of type {type(key).__name__}"
        raise Refused(f"key {named} occurs twice in one dict")
    target[key] = value


def _integer(value: int) -> Any:
    return value if value.bit_length() <= MAX_BITS else Opaque("int", (value,))


def _tensor(args: tuple[Any, ...]) -> TensorRef:
    if len(args) < 4:
        raise Refused("a tensor without a shape")
    storage, offset, shape, stride = args[:4]
    if isinstance(shape, Opaque) and shape.name == "torch.Size":
        shape = shape.args[0] if shape.args else ()
    if not isinstance(storage, StorageRef) or type(shape) is not tuple or type(stride) is not tuple:
        raise Refused("a tensor without a storage, a shape or strides")
    if len(shape) != len(stride) or len(shape) > 8:
        raise Refused("a tensor of more than 8 dimensions, or with other strides")
    numbers = (offset, *shape, *stride)
    if any(type(n) is not int for n in numbers):
        raise Refused("a tensor whose shape, stride or offset is not made of integers")
    if any(not 0 <= n < 2**40 for n in numbers):
        raise Refused(f"a tensor of shape {shape}, stride {stride}, offset {offset}"[:200])
    return TensorRef(storage, offset, shape, stride)
