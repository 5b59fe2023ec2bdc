"""300 hostile checkpoints by a generator: read, written back, and opened by who trusts them.

    python -m benchmarks.hostile_generated        # prints the table of docs/results/hostile.md

Every payload is combined with every place in a checkpoint where it could hide and both formats of
``torch.save``; bombs come in several sizes. What DHBE accepts is purified, and the result is opened
with ``torch.load(weights_only=False)``. A payload that runs leaves a file.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import types
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.hostile import MARK, good, rezipped, safetensors, verdicts
from dhbe.models.resnet import CifarResNet

Make = Callable[[Path], object]
EVIL = "harmless_looking"
"""A module that a trusting reader could import; it lies beside the files."""
EVIL_CODE = (
    f"def run(*_, **__):\n    open({MARK!r}, 'w').close()\n\nclass Loss:\n    __init__ = run\n"
)
NAMES: dict[str, tuple[str, str, tuple[Any, ...]]] = {
    "os.system": ("posix", "system", (f"touch {MARK}",)),
    "eval": ("builtins", "eval", (f"open({MARK!r}, 'w')",)),
    "exec": ("builtins", "exec", (f"open({MARK!r}, 'w')",)),
    "subprocess.call": ("subprocess", "call", (["touch", MARK],)),
    "runpy": ("runpy", "_run_code", (f"open({MARK!r}, 'w')", {})),
    "timeit": ("timeit", "timeit", (f"open({MARK!r}, 'w')", "pass", None, 1)),
    "pdb": ("pdb", "run", (f"open({MARK!r}, 'w')",)),
    "code": ("code", "compile_command", (f"open({MARK!r}, 'w')",)),
    "an unknown function": (EVIL, "run", ()),
    "an unknown class": (EVIL, "Loss", ()),
}


class Call:
    """Pickles as a call of a name."""

    def __init__(self, module: str, name: str, args: tuple[Any, ...]) -> None:
        self.parts = module, name, args

    def __reduce__(self) -> tuple[Any, ...]:
        module, name, args = self.parts
        if module == EVIL:
            evil()
        return getattr(__import__(module), name), args


def evil() -> types.ModuleType:
    """The unknown module, so that pickle can name what is in it."""
    if EVIL not in sys.modules:
        sys.modules[EVIL] = module = types.ModuleType(EVIL)
        exec(EVIL_CODE, module.__dict__)
    return sys.modules[EVIL]


def with_metadata(payload: Any) -> Any:
    """In the attributes of the state dict itself."""
    weights = OrderedDict(good())
    weights._metadata = OrderedDict(version=payload)  # type: ignore[attr-defined]
    return weights


class Hooked:
    """A tensor whose hooks, or state, are a payload."""

    def __init__(self, payload: Any, maker: str) -> None:
        self.payload, self.maker = payload, maker

    def __reduce__(self) -> tuple[Any, ...]:
        tensor = torch.ones(2, 2)
        storage = torch.storage.TypedStorage(
            wrap_storage=tensor.untyped_storage(), dtype=torch.float32, _internal=True
        )
        base = (storage, 0, (2, 2), (2, 1), False)
        if self.maker == "hooks":
            return torch._utils._rebuild_tensor_v2, (*base, OrderedDict(a=self.payload))
        if self.maker == "parameter":
            return torch._utils._rebuild_parameter, (tensor, True, OrderedDict(a=self.payload))
        state = {"__class__": self.payload, "a": self.payload}
        maker = torch._utils._rebuild_tensor_v2
        args: tuple[Any, ...] = (*base, OrderedDict())
        return torch._tensor._rebuild_from_type_v2, (maker, torch.Tensor, args, state)


PLACES: dict[str, Callable[[Any], Any]] = {
    "on top": lambda p: p,
    "beside the weights": lambda p: good() | {"loss": p},
    "beside a nested state dict": lambda p: {"state_dict": good(), "cfg": p},
    "deep in the optimizer": lambda p: {
        "model": good(),
        "optimizer": {"state": {0: [{"a": (p,)}]}},
    },
    "as a key": lambda p: {"model": good(), "x": {p: 1}},
    "in a tuple that is a key": lambda p: {"model": good(), "x": {(1, p): 1}},
    "in a namespace": lambda p: {"model": good(), "args": argparse.Namespace(lr=0.1, a=p)},
    "in a set": lambda p: {"model": good(), "x": [{1, 2}, frozenset([p])]},
    "in the state dict's metadata": with_metadata,
    "in hooks of a tensor": lambda p: good() | {"x": Hooked(p, "hooks")},
    "in hooks of a parameter": lambda p: good() | {"x": Hooked(p, "parameter")},
    "in the state of a tensor's type": lambda p: good() | {"x": Hooked(p, "type")},
}


REAL = len(NAMES) * len(PLACES) * 2


def payloads() -> Iterator[tuple[str, Make]]:
    """Every name at every place in both formats."""
    for (name, parts), (place, put), legacy in itertools.product(
        NAMES.items(), PLACES.items(), (False, True)
    ):

        def make(path: Path, parts: Any = parts, put: Any = put, legacy: bool = legacy) -> None:
            torch.save(put(Call(*parts)), path, _use_new_zipfile_serialization=not legacy)

        yield f"{name} {place}{' (before 1.6)' if legacy else ''}", make


def text(value: str) -> bytes:
    """A string for pickle."""
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


STORAGE = b"X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
ONE = b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuI108\n"
MAKER = b"ctorch._utils\n_rebuild_tensor_v2\nq\x63"
ORDERED = b"ccollections\nOrderedDict\n"


def doubling(times: int, kind: str) -> bytes:
    """A container that holds one container twice, and so on: 2^times of them in a few bytes."""
    if kind == "tuple":
        return b")" + b"q\x01h\x01\x86" * times
    return b"}" + b"".join(
        b"q\x01}" + text("a") + b"h\x01s" + text("b") + b"h\x01s" for _ in range(times)
    )


def tensors_of(count: int, storages: int) -> bytes:
    """Many tensors over a few storages in turn."""
    made = b"}" + MAKER + b"0("
    for i in range(count):
        made += text(f"w{i}.weight") + b"h\x63((" + STORAGE + text(str(i % storages))
        made += b"X\x03\x00\x00\x00cpuI108\ntQI0\n(I9\nI12\nt(I12\nI1\nt\x89}tR"
    return made + b"u."


def bombs() -> Iterator[tuple[str, Make]]:
    """Pickles of a few kB that would take for ever, or gigabytes."""
    yield from doubled()
    yield from repeated()
    yield from wide_integers()
    yield "integer of 5,000 digits", pickled(b"}" + text("epoch") + b"I" + b"9" * 5_000 + b"\ns.")
    yield "1,000,000 dicts", pickled(b"](" + b"}" * 999_000 + b"e.")
    yield "300,000 objects", pickled(b"carg\nX\nq\x01](" + b"h\x01)\x81" * 299_000 + b"e.")
    yield "60 MB of opcodes", pickled(b"N0" * 30_000_000 + b".")
    yield "a name of 1 MB", pickled(text("a" * 1_000_000) + text("b") + b"\x93.")


def doubled() -> Iterator[tuple[str, Make]]:
    """Containers that hold each other, in places where a name or a number belongs."""
    for times, kind in itertools.product((30, 60, 400), ("tuple", "dict")):
        made = doubling(times, kind)
        yield f"global named by {kind}s, 2^{times}", pickled(made + text("x") + b"\x93.")
        yield f"module named by {kind}s, 2^{times}", pickled(text("x") + made + b"\x93.")
        yield f"key of {kind}s, 2^{times}", pickled(b"}" + made + b"Ns.")
        yield (
            f"storage named by {kind}s, 2^{times}",
            pickled(
                b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
                + made
                + b"X\x03\x00\x00\x00cpuI4\ntQ."
            ),
        )
        yield (
            f"args of {kind}s, 2^{times}",
            pickled(
                b"}" + text("model") + b"}s" + text("args") + b"cargparse\nNamespace\n)\x81"
                b"}" + text("a") + made + b"sbs."
            ),
        )
        yield (
            f"shape of {kind}s, 2^{times}",
            pickled(MAKER + b"((" + STORAGE + ONE + b"tQI0\n" + made + b")\x89}tR."),
        )


def repeated() -> Iterator[tuple[str, Make]]:
    """One large object, used many times."""
    big = b"](" + b"K\x01" * 50_000 + b"e"
    pairs = b"](" + b"".join(text(f"k{i}") + b"N\x86" for i in range(20_000)) + b"e"
    for count in (1_000, 20_000):
        yield (
            f"{count:,} ordered dicts of 20,000 pairs",
            pickled(pairs + b"q\x01" + ORDERED + b"q\x02" + b"h\x02h\x01\x85R0" * count + b"."),
        )
        yield (
            f"{count:,} states of 50,000 items",
            pickled(big + b"q\x01cargparse\nNamespace\n)\x81" + b"h\x01b" * count + b"."),
        )
        yield (
            f"{count:,} calls with 50,000 items",
            pickled(big + b"q\x01cnumpy\ndtype\nq\x02" + b"h\x02h\x01\x85R0" * count + b"."),
        )
        yield (
            f"{count:,} storages of 50,000 items",
            pickled(b"(" + b"N" * 50_000 + b"tq\x01" + b"h\x01Q0" * count + b"."),
        )
        yield (
            f"{count:,} encodings of 1 MB",
            pickled(
                text("a" * 1_000_000)
                + b"q\x01c_codecs\nencode\nq\x02X\x06\x00\x00\x00latin1q\x03"
                + b"]("
                + b"h\x02h\x01h\x03\x86R" * count
                + b"e."
            ),
        )
        yield f"{count:,} arrays of 1 MB", pickled(arrays(count, 1_000_000))


def wide_integers() -> Iterator[tuple[str, Make]]:
    """Integers of many bits, in every place that takes one."""
    for bits in (64, 20_000, 8_000_000):
        raw = (1 << bits).to_bytes(bits // 8 + 2, "little")
        wide = b"\x8b" + struct.pack("<i", len(raw)) + raw
        yield f"key of {bits:,} bits", pickled(b"}" + text("model") + b"}" + wide + b"Nss.")
        yield f"epoch of {bits:,} bits", pickled(b"}" + text("epoch") + wide + b"s.")
        yield (
            f"tensor of {bits:,} bits",
            pickled(
                MAKER
                + b"(("
                + STORAGE
                + ONE
                + b"tQI0\n("
                + wide * 8
                + b"t("
                + wide * 8
                + b"t\x89}tR."
            ),
        )
        yield (
            f"storage of {bits:,} bits",
            pickled(b"(" + STORAGE + wide + text("cpu") + wide + b"tQ."),
        )


def arrays(count: int, size: int) -> bytes:
    """Arrays over the same bytes."""
    number = struct.pack("<i", size)
    one = b"h\x03(cnumpy\nndarray\n(K\x00tC\x01btR(K\x01(J" + number + b"th\x01\x89h\x02tb"
    return (
        b"cnumpy\ndtype\n(X\x02\x00\x00\x00u1\x89\x88tR"
        b"(K\x03X\x01\x00\x00\x00|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tbq\x010"
        b"cnumpy.core.multiarray\n_reconstruct\nq\x030"
        b"B" + number + bytes(size) + b"q\x020](" + one * count + b"e."
    )


def pickled(raw: bytes) -> Make:
    """A saved state dict with this data.pkl."""
    return lambda path: rezipped(path, lambda n, old: raw if n.endswith("data.pkl") else old)


def legacy(tree: bytes, keys: list[str], storages: bytes) -> Make:
    """A file in the format before 1.6."""
    buffer = io.BytesIO()
    torch.save({}, buffer, _use_new_zipfile_serialization=False)
    head = buffer.getvalue()
    head = head[: head.index(b"uu.") + 3]
    return lambda path: path.write_bytes(head + tree + pickle.dumps(keys, 2) + storages)


def files() -> Iterator[tuple[str, Make]]:
    """Bombs that are whole files."""
    for count in (3_000, 200_000):
        keys = [str(i) for i in range(count)]
        yield (
            f"{count:,} storages (before 1.6)",
            legacy(tensors_of(min(count, 3_000), count), keys, struct.pack("<q", 0) * count),
        )
    for size in (1, 40):
        yield f"3,000 tensors over two storages of {size} MB in turn", alternating(size)
    for length, depth in ((100_000, 1), (290, 40), (20, 400)):
        yield f"TorchScript, keys of {length:,} letters {depth} deep", scripted(length, depth)
    yield from safetensors_files()
    yield from odd_facts()
    for dimensions in (9, 1_000, 100_000):
        yield f"torch.export, {dimensions:,} dimensions", exported(dimensions)
    yield "safetensors that is a tar archive", tar_in_safetensors
    yield "safetensors that is a pickle", pickle_in_safetensors
    yield "a tar archive of torch 0.1", lambda p: p.write_bytes(tar_of_payload())
    for record in ("data/0", "data/7", "data.pkl", ".data/serialization_id"):
        yield f"wrong checksum of {record}", wrong_checksum(record)


def safetensors_files() -> Iterator[tuple[str, Make]]:
    """Headers of safetensors that lie, and odd shapes."""
    yield (
        "safetensors, overlapping",
        lambda p: safetensors(p, {"a": entry([4], 0, 16), "b": entry([4], 8, 24)}, bytes(24)),
    )
    yield (
        "safetensors, twice the same place",
        lambda p: safetensors(p, {"a": entry([4], 0, 16), "b": entry([4], 0, 16)}, bytes(16)),
    )
    yield (
        "safetensors, a gap",
        lambda p: safetensors(p, {"a": entry([4], 0, 16), "b": entry([4], 20, 36)}, bytes(36)),
    )
    yield (
        "safetensors, shape of 5,000 digits",
        lambda p: safetensors(
            p,
            b'{"w":{"dtype":"F32","shape":[' + b"9" * 5_000 + b'],"data_offsets":[0,4]}}',
            bytes(4),
        ),
    )
    yield (
        "safetensors, a 0-dimensional conv1.weight",
        lambda p: safetensors(
            p, {"conv1.weight": entry([], 0, 4), "fc.weight": entry([2, 2], 4, 20)}, bytes(20)
        ),
    )
    yield (
        "safetensors, 9 dimensions",
        lambda p: safetensors(p, {"conv1.weight": entry([1] * 9, 0, 4)}, bytes(4)),
    )
    for shape in ([], [0], [1, 0, 5], [1, 197], [7, 3, 1, 1, 1]):
        yield f"safetensors, a pos_embed of shape {shape}", odd("pos_embed", shape)
        yield f"safetensors, a running_mean of shape {shape}", odd("bn1.running_mean", shape)
        yield f"safetensors, an fc.bias of shape {shape}", odd("fc.bias", shape)


def odd_facts() -> Iterator[tuple[str, Make]]:
    """A known network beside words and numbers that mislead."""
    for said in ("1", "[1,1,1]", "[0,0,0]", "[" + "9," * 40 + "9]", "nan", "[.,.,.]", "9" * 99):
        yield (
            f"a known network whose metadata say {said}",
            lambda p, said=said: save_file(known(), p, metadata={k: said for k in FACTS}),
        )
    facts: list[Any] = [
        [1],
        [0.0] * 3,
        [2**70],
        ["a"],
        1,
        "1",
        float("nan"),
        None,
        10**4400,
        {"a": 1},
    ]
    for fact in facts:
        kind = f"{type(fact).__name__} {str(fact)[:9]}" if fact != 10**4400 else "4,400 digits"
        yield (
            f"a known network beside facts of {kind}",
            lambda p, fact=fact: torch.save({"model": known(), **dict.fromkeys(FACTS, fact)}, p),
        )
    for value in (torch.ones(3), torch.zeros(3), torch.ones(()), torch.full((3,), -1.0)):
        yield (
            f"a known network behind statistics of {value.tolist()}",
            lambda p, value=value: torch.save(known(value), p),
        )


def entry(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict[str, Any]:
    """One tensor of a safetensors header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


FACTS = ("mean", "std", "num_classes", "img_size", "image_size", "arch", "dataset", "in_chans")


def known(statistics: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """A CIFAR ResNet-20, which DHBE recognises; behind a layer of statistics, if given."""
    torch.manual_seed(0)
    network = CifarResNet(widths=[16, 32, 64], blocks=3, classes=10, channels=3, image_size=32)
    weights = dict(network.state_dict())
    if statistics is None:
        return weights
    return {f"1.{k}": v for k, v in weights.items()} | {"0.mean": statistics, "0.std": statistics}


def odd(key: str, shape: list[int]) -> Make:
    """A tensor of another shape than its name promises, beside a small network."""
    size = 4 * math.prod(shape)
    head = {"conv1.weight": entry([4, 3, 3, 3], 0, 432), "fc.weight": entry([2, 4], 432, 464)}
    head |= {
        key: entry(shape, 464, 464 + size),
        "blocks.0.norm1.weight": entry([], 464 + size, 468 + size),
    }
    return lambda path: safetensors(path, head, bytes(468 + size))


def exported(dimensions: int) -> Make:
    """A weight of ``torch.export`` with many dimensions of 1."""
    one = [{"as_int": 1}] * dimensions
    meta = {"dtype": 7, "sizes": one, "strides": one, "storage_offset": {"as_int": 0}}
    said = {"config": {"w": {"path_name": "weight_0", "use_pickle": False, "tensor_meta": meta}}}
    config = json.dumps(said).encode()
    extra = {
        "archive/data/weights/model_weights_config.json": config,
        "archive/data/weights/weight_0": bytes(4),
    }
    return lambda path: rezipped(path, lambda _, old: old, **extra)


def alternating(megabytes: int) -> Make:
    """Each reading of a storage throws the other out of a cache of one."""

    def make(path: Path) -> None:
        torch.save([torch.zeros(megabytes * 2**18), torch.ones(megabytes * 2**18)], path)
        raw = tensors_of(3_000, 2)
        with zipfile.ZipFile(path) as old:
            records = {n: old.read(n) for n in old.namelist()}
        with zipfile.ZipFile(path, "w") as new:
            for name, held in records.items():
                new.writestr(name, raw if name.endswith("data.pkl") else held)

    return make


def scripted(length: int, depth: int) -> Make:
    """Modules that share their parts, under long names."""
    made = b"c__torch__\nM\n)\x81}" + text("w") + b"Nsb"
    for i in range(depth):
        key = text(chr(97 + i % 26) * length)
        made += b"q\x010c__torch__\nM\n)\x81}" + key + b"h\x01s" + text("b" * length) + b"h\x01sb"
    return lambda path: rezipped(
        path,
        lambda n, old: made + b"." if n.endswith("data.pkl") else old,
        **{"archive/code/x.py": b""},
    )


def wrong_checksum(record: str) -> Make:
    """One byte changed, where nothing may look before writing."""

    def make(path: Path) -> None:
        torch.save(
            {"model": good(), "unused": [torch.full((5,), float(i)) for i in range(9)]}, path
        )
        with zipfile.ZipFile(path) as held:
            name = next((n for n in held.namelist() if n.endswith(record)), held.namelist()[0])
            info = held.getinfo(name)
        raw = bytearray(path.read_bytes())
        skip = sum(struct.unpack("<HH", raw[info.header_offset + 26 : info.header_offset + 30]))
        raw[info.header_offset + 30 + skip + 3] ^= 1
        path.write_bytes(bytes(raw))

    return make


def tar_of_payload() -> bytes:
    """What ``torch.load`` takes for a file of version 0.1.10, and unpickles."""
    buffer = io.BytesIO()
    call = pickle.dumps(Call("posix", "system", (f"touch {MARK}",)), 2)
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as made:
        for name in ("storages", "tensors", "pickle"):
            info = tarfile.TarInfo(name)
            info.size = len(call)
            made.addfile(info, io.BytesIO(call))
    return buffer.getvalue()


def tar_in_safetensors(path: Path) -> None:
    """The names of its tensors are the header of a tar archive that goes on in a tensor."""
    inner = tar_of_payload()
    weights = {"conv1.weight": entry([4, 3, 3, 3], 0, 432), "fc.weight": entry([2, 4], 432, 464)}
    size = 2048  # where the archive's second member lies
    fields = ("0000644 ", "0000000 ", "0000000 ", f"{size - 512:011o} ", "00000000000 ")
    first, second = "a" * 90 + "".join(fields) + "CHECKSUM0", "0" * 290
    head = {n: entry([0], 464, 464, "U8") for n in (first, second)} | weights
    body = bytes(1000) + inner
    for _ in range(2):  # the length of the text depends on that of the body
        held = {"x": entry([len(body)], 464, 464 + len(body), "U8")}
        text = json.dumps(head | held, separators=(",", ":"))
        body = bytes(size - 8 - len(text) - 464) + inner
    start = struct.pack("<Q", len(text))
    block = (start + text.encode())[:512]
    text = text.replace("CHECKSUM", f"{256 + sum(block[:148]) + sum(block[156:]):06o}  ")
    path.write_bytes(start + text.encode() + bytes(464) + body)


def pickle_in_safetensors(path: Path) -> None:
    """The length of its header is an opcode; the pickle jumps over names into a tensor."""
    length, first = 0x58 + 256 * 12, 12  # 'X', and a text of 12 bytes
    payload = b"cposix\nsystem\n(S'touch " + MARK.encode() + b"'\ntR."
    size = len(payload)
    real = {"payload": entry([size], 0, size, "U8")}
    real["c.weight"] = entry([4, 27], size, size + 432)
    real["fc.weight"] = entry([2, 4], size + 432, size + 464)
    wide, made = 100, ""
    while len(made) < length - 60:  # names to land on, with the rest between them
        wide, head, rest = wide + 1, {}, dict(real)
        for i in range(10):
            head[f"{i}" + "z" * wide] = entry([0], 0, 0, "U8")
            if rest:
                head |= [rest.popitem()]
        made = json.dumps(head, separators=(",", ":"))
    raw = bytearray(made.encode().ljust(length))
    free = [raw[i : i + 2] == b"zz" for i in range(length)]
    at = 5 + first - 8
    while at < length:  # each jump ends where the next can start, or behind the header
        ends = [at + 2 + n for n in range(126) if at + 2 + n >= length or free[at + 2 + n]]
        end = min(max(ends), length)
        raw[at : at + 2] = b"U" + bytes([end - at - 2])
        at = end
    path.write_bytes(struct.pack("<Q", length) + bytes(raw) + payload + bytes(464))


def every() -> dict[str, Make]:
    """All inputs: description -> maker."""
    return dict(itertools.chain(payloads(), bombs(), files()))


TRUSTING = f"""
import json, os, pickle, sys, torch
names = json.loads(sys.stdin.read())
for name in names:
    for read in (torch.load, lambda f, **_: pickle.load(open(f, 'rb'))):
        try:
            read(name, weights_only=False)
        except BaseException:
            pass
        if os.path.exists({MARK!r}):
            os.remove({MARK!r})
            print("ran", name, flush=True)
            break
"""


def trusted(folder: Path, names: list[str]) -> list[str]:
    """Open files with ``torch.load(weights_only=False)`` and ``pickle``; those that ran something.

    Raises:
        RuntimeError: the reader itself died.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TRUSTING],
        input=json.dumps(names),
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": "."},
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return [line.split()[1] for line in done.stdout.splitlines() if line.startswith("ran ")]


def main() -> None:
    """Print what became of every kind of input."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows, ran = tried(folder)
        real = trusted(folder, [f"{i:03}.pt" for i in range(len(rows)) if i < REAL])
    kinds = Counter(outcome(r["said"]) for r in rows)
    refused = [r for r in rows if r["said"]]
    table = {
        "inputs": len(rows),
        f"of the {REAL} payloads, those that run where torch.load trusts the input": len(real),
        "inputs whose weights were read and written back, the rest left out": sum(
            r["written"] is not None for r in rows
        ),
        "code executed here, or where torch.load or pickle trust what was written": int(ran),
        "tracebacks and hangs": kinds.pop("traceback", 0),
        "most CPU seconds of a refusal": f"{max(r['seconds'] for r in refused):.2f}",
        "most memory of a refusal, MB": f"{max(r['mb'] for r in refused):.0f}",
    }
    print("| what | measured |\n|---|---|")
    for what, count in table.items():
        print(f"| {what} | {count} |")
    print("\n| end | inputs |\n|---|---|")
    for kind, count in kinds.most_common():
        print(f"| {kind} | {count} |")
    print("\n| slowest and largest | CPU s | MB |\n|---|---|---|")
    for key in ("seconds", "mb"):
        for row in sorted(refused, key=lambda r: -r[key])[:4]:
            print(f"| {row['file']} | {row['seconds']:.2f} | {row['mb']:.0f} |")


def tried(folder: Path, inputs: dict[str, Make] | None = None) -> tuple[list[dict[str, Any]], bool]:
    """Make all, read and write them back, open the results; rows, and whether anything ran."""
    (folder / f"{EVIL}.py").write_text(EVIL_CODE)
    rows = verdicts(folder, every() if inputs is None else inputs)
    here = (folder / MARK).exists()
    return rows, here or bool(trusted(folder, [r["written"] for r in rows if r["written"]]))


def outcome(said: str | None) -> str:
    """A refusal without what differs between files."""
    if said is None:
        return "a known network, read and written back"
    if "TRACEBACK" in said:
        return "traceback"
    reason = said.split(" state dict (", 1)[-1].split("); nothing in it", 1)[0]
    reason = re.sub(r"'[^']*'|\([^)]*\)?", "...", reason.split("victim.path=", 1)[-1])
    return re.sub(r"\d[\d,]*", "N", reason).replace("|", "/")[:90]


if __name__ == "__main__":
    main()
