"""Hostile and broken checkpoints, made on the spot, and what the reader says to each.

    python benchmarks/hostile.py          # the table of docs/security.md: refusal, CPU seconds, MB

The tests make the same files and ask that each is refused, and that none runs code.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MARK = "EXECUTED"
"""File that a payload would make."""
Make = Callable[[Path], object]
FILES: dict[str, Make] = {}
"""Description -> function that writes the file."""


def hostile(description: str) -> Callable[[Make], Make]:
    """Register a maker."""

    def register(make: Make) -> Make:
        FILES[description] = make
        return make

    return register


def good() -> dict[str, torch.Tensor]:
    """A small state dict."""
    return {"conv1.weight": torch.ones(4, 3, 3, 3), "fc.weight": torch.ones(2, 4)}


class Payload:
    """Runs a shell command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {MARK}",)


class Evaluated:
    """Evaluates an expression when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"open({MARK!r}, 'w')",)


def rezipped(path: Path, change: Callable[[str, bytes], bytes | None], **extra: bytes) -> None:
    """A saved state dict with records changed, dropped (None) or added."""
    buffer = io.BytesIO()
    torch.save(good(), buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as target:
        for info in source.infolist():
            raw = change(info.filename, source.read(info))
            if raw is not None:
                target.writestr(info.filename, raw)
        for name, raw in extra.items():
            target.writestr(name, raw)


def pickled(description: str, raw: bytes) -> None:
    """Register a saved state dict with this data.pkl."""

    def change(name: str, old: bytes) -> bytes:
        return raw if name.endswith("data.pkl") else old

    hostile(description)(lambda path: rezipped(path, change))


def safetensors(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(shape: list[Any], start: int, stop: int, dtype: str = "F32") -> dict[str, Any]:
    """One tensor of a safetensors header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def tensor_pickle(shape: str, stride: str, offset: int = 0, numel: int = 108) -> bytes:
    """Pickle of ``{"w": tensor}`` with any geometry, in pickle's text protocol."""
    return (
        b"}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storage"
        b"ctorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
        + f"I{numel}\n".encode()
        + b"tQ"
        + f"I{offset}\n({shape}t({stride}t".encode()
        + b"\x89}tRs."
    )


class Special:
    """Its state names special attributes."""

    def __getstate__(self) -> dict[str, Any]:
        return {"__class__": 1}


SPECIAL = f"{Special.__module__}\nSpecial".encode()


def doubled(kind: type, times: int) -> Any:
    """A container that holds one container twice, and so on."""
    made: Any = kind()
    for _ in range(times):
        made = {"a": made, "b": made} if kind is dict else (made, made)
    return made


def claimed(path: Path, names: list[str]) -> None:
    """A safetensors file with a tiny tensor under each name."""
    header = {n: entry([1, 1, 1, 1], 4 * i, 4 * i + 4) for i, n in enumerate(names)}
    safetensors(path, header, bytes(4 * len(names)))


def packed_in(path: Path, name: str) -> None:
    """Add 100 MB of zeros, compressed."""
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as target:
        target.writestr(name, bytes(100_000_000))


def ints(*values: int) -> str:
    """Integers in the text protocol."""
    return "".join(f"I{v}\n" for v in values)


# ---------------------------------------------------------------- code

hostile("pickle calls os.system")(lambda p: torch.save({"model": good(), "x": Payload()}, p))
hostile("the same in the format before 1.6")(
    lambda p: torch.save(Payload(), p, _use_new_zipfile_serialization=False)
)
hostile("pickle calls eval")(lambda p: torch.save([Evaluated()], p))
pickled(
    "pickle fetches exec with getattr",
    b"c__builtin__\ngetattr\n(c__builtin__\n__dict__\nS'exec'\ntR.",
)
hostile("bare pickle with payload, no torch.save")(lambda p: p.write_bytes(pickle.dumps(Payload())))
pickled("payload named by STACK_GLOBAL (protocol 4)", pickle.dumps(Payload(), protocol=4))
pickled("payload by INST opcode", b"(S'touch EXECUTED'\nios\nsystem\n.")
pickled("payload by OBJ opcode", b"(cos\nsystem\nS'touch EXECUTED'\no.")
pickled(
    "name with dots inside a harmless module", b"\x80\x04\x8c\x05numpy\x8c\x0fcore.os.system1\x93."
)
pickled("torch function that allocates on call", b"ctorch\nempty\n(I1000000000000\ntR.")
hostile("a whole pickled module")(lambda p: torch.save(torch.nn.Linear(2, 2), p))
pickled("persistent id that is not a storage", b"X\x01\x00\x00\x00aQ.")
pickled("extension registry opcode", b"\x82\x01.")

pickled("dictionary of a harmless module", b"ctorch.jit._pickle\n__dict__\n.")
pickled(
    "attributes set through the state of an object",
    b"cargparse\nNamespace\n(tR(N}X\x01\x00\x00\x00aI1\nstb.",
)
pickled("attributes of a class set", b"cargparse\nNamespace\n}X\x01\x00\x00\x00aI1\nsb.")
pickled(
    "special attributes set",
    pickle.dumps(Special(), protocol=2).replace(SPECIAL, b"argparse\nNamespace"),
)

# ---------------------------------------------------------------- size

pickled("bytes of 1 TB on call", b"c__builtin__\nbytes\n(I1000000000000\ntR.")
pickled("storage of 1 TB on call", b"ctorch\nFloatStorage\n(I1000000000000\ntR.")
pickled(
    "array of 1 TB on call",
    b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I1000000000000\nt"
    b"X\x01\x00\x00\x00btR.",
)
pickled(
    "text in the encoding of a decompressor",
    b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x04\x00\x00\x00zlibtR.",
)
pickled(
    "dicts that hold each other 2^60 times", pickle.dumps({"model": doubled(dict, 60)}, protocol=2)
)
pickled(
    "tuples that hold each other 2^60 times, as a storage's name",
    b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    + pickle.dumps(doubled(tuple, 60), protocol=2)[2:-1]
    + b"X\x03\x00\x00\x00cpuI4\ntQ.",
)
hostile("500 stages and 500 blocks of a ResNet")(
    lambda p: claimed(
        p,
        ["stem.0.weight"]
        + [f"stages.{i}.0.conv1.weight" for i in range(500)]
        + [f"stages.0.{i}.conv1.weight" for i in range(1, 500)],
    )
)
hostile("9,900 blocks in odd order")(
    lambda p: claimed(p, [f"layer1.{i * 7919 % 9900}.bn1.weight" for i in range(9_900)])
)
hostile("a name of 40,000 letters")(lambda p: claimed(p, ["1." * 20_000 + "weight"]))
hostile("a layer with a number of 5,000 digits")(
    lambda p: claimed(p, [f"layer{'9' * 250}.1.bn1.weight", "layer1.1.bn1.weight"])
)
hostile("byte order of 50 MB")(
    lambda p: rezipped(p, lambda n, raw: b" " * 50_000_000 if n.endswith("byteorder") else raw)
)


@hostile("zip bomb in the folder of a program")
def bomb_in_a_program(p: Path) -> None:
    """Beside a program that is never read."""
    rezipped(p, lambda _, raw: raw)
    packed_in(p, "other/code/x.py")


pickled("a tensor that overlaps itself", tensor_pickle(ints(10, 10), ints(1, 1)))
hostile("safetensors header of 1 TB")(lambda p: safetensors(p, b"{" + b" " * 64, length=1 << 40))
hostile("safetensors header longer than the file")(
    lambda p: safetensors(p, b'{"a":1}', length=1 << 20)
)
hostile("safetensors tensor of 1 TB in an empty file")(
    lambda p: safetensors(p, {"w": entry([1 << 38], 0, 1 << 40)})
)
hostile("safetensors shape whose product overflows")(
    lambda p: safetensors(p, {"w": entry([1 << 39] * 8, 0, 4)}, b"\0" * 4)
)
pickled("tensor of 1 TB on a storage of 432 bytes", tensor_pickle(ints(1 << 38), ints(1)))
pickled("stride 0 blows 4 bytes up to 1 TB", tensor_pickle(ints(1 << 19, 1 << 19), ints(0, 0)))
pickled("storage that claims 1 TB", tensor_pickle(ints(4), ints(1), numel=1 << 38))
pickled("negative offset", tensor_pickle(ints(4), ints(1), offset=-4))
pickled("negative shape", tensor_pickle(ints(-4), ints(1)))
pickled("string of 1 EB announced in the pickle", b"\x8d" + struct.pack("<Q", 1 << 60) + b".")
pickled("memo index of 2 billion", b"Nr" + b"\xff\xff\xff\x7f" + b"0.")
pickled("byte array of 1 TB", b"\x96" + struct.pack("<Q", 1 << 40) + b".")


@hostile("zip bomb: a compressed storage of 128 MB")
def _(path: Path) -> None:
    def packed(name: str) -> zipfile.ZipInfo:
        info = zipfile.ZipInfo(name)
        info.compress_type = zipfile.ZIP_DEFLATED
        return info

    with zipfile.ZipFile(path, "w") as target:
        target.writestr("a/data.pkl", tensor_pickle(ints(1 << 25), ints(1), numel=1 << 25))
        with target.open(packed("a/data/0"), "w") as record:
            for _ in range(8):
                record.write(b"\0" * (1 << 24))


@hostile("30,000 records in the zip")
def _(path: Path) -> None:
    rezipped(path, lambda _, raw: raw, **{f"archive/{i}": b"" for i in range(30_000)})


@hostile("overlapping records (one block listed many times)")
def _(path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as target:
        target.writestr("a/data/0", b"\0" * (1 << 20))
        first = target.infolist()[0]
        for i in range(1, 1000):
            twin = zipfile.ZipInfo(f"a/data/{i}")
            twin.header_offset, twin.CRC = first.header_offset, first.CRC
            twin.compress_size = twin.file_size = first.file_size
            target.filelist.append(twin)
            target.NameToInfo[twin.filename] = twin
    path.write_bytes(buffer.getvalue())


@hostile("sparse file of 5 GB")
def _(path: Path) -> None:
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 64) + b"{")
        file.truncate(5 << 30)


pickled("four million pickle opcodes", b"N0" * 2_000_000 + b"}.")
hostile("safetensors with 300,000 tensors")(
    lambda p: safetensors(p, {f"t{i}": entry([0], 0, 0) for i in range(300_000)})
)

# ---------------------------------------------------------------- nesting and keys

pickled("lists nested 200,000 deep", b"]" * 200_000 + b"a" * 199_999 + b".")
pickled(
    "dicts nested 100,000 deep under 'model'",
    b"}" + b"X\x05\x00\x00\x00model}" * 100_000 + b"s" * 100_000 + b".",
)
pickled("a list that holds itself", b"]q\x00h\x00a.")
pickled("tuple of tuples as key (hash bomb)", b"})" + b"2\x86" * 60 + b"Ns.")
pickled(
    "integer keys chosen to collide",
    b"}("
    + b"".join(b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N" for i in range(40_000))
    + b"u.",
)
hostile("JSON nested 100,000 deep")(lambda p: safetensors(p, b'{"a":' + b"[" * 100_000 + b"}"))
hostile("safetensors key twice")(
    lambda p: safetensors(
        p,
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"w":{"dtype":"F32",'
        b'"shape":[1],"data_offsets":[4,8]}}',
        b"\0" * 8,
    )
)
pickled("pickle key twice", b"}X\x01\x00\x00\x00wNsX\x01\x00\x00\x00wNs.")

# ---------------------------------------------------------------- archives

hostile("record named ../../evil")(
    lambda p: rezipped(p, lambda _, r: r, **{"archive/../../evil": b"x"})
)
hostile("record with an absolute name")(
    lambda p: rezipped(p, lambda _, r: r, **{"/etc/evil": b"x"})
)
hostile("record with a backslash")(
    lambda p: rezipped(p, lambda _, r: r, **{"archive\\..\\evil": b"x"})
)


@hostile("symbolic link in the archive")
def _(path: Path) -> None:
    rezipped(path, lambda _, raw: raw)
    link = zipfile.ZipInfo("archive/data/9")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "a") as target:
        target.writestr(link, "/etc/passwd")


@hostile("the same record twice")
def _(path: Path) -> None:
    import warnings

    rezipped(path, lambda _, raw: raw)
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as target:
        warnings.simplefilter("ignore")
        target.writestr(target.namelist()[0], b"x")


hostile("storage missing from the archive")(
    lambda p: rezipped(p, lambda name, r: None if name.endswith("data/0") else r)
)
hostile("a zip without data.pkl")(
    lambda p: rezipped(p, lambda name, r: None if name.endswith("data.pkl") else r)
)
hostile("big-endian archive")(
    lambda p: rezipped(p, lambda name, r: b"big" if name.endswith("byteorder") else r)
)


@hostile("truncated archive")
def _(path: Path) -> None:
    torch.save(good(), path)
    path.write_bytes(path.read_bytes()[:-200])


@hostile("flipped byte in a storage")
def _(path: Path) -> None:
    torch.save(good(), path)
    raw = path.read_bytes()
    at = raw.index(struct.pack("<f", 1.0) * 8)
    path.write_bytes(raw[:at] + b"\x00\x00\x80\x40" + raw[at + 4 :])


# ---------------------------------------------------------------- values

hostile("NaN weights")(
    lambda p: torch.save(good() | {"fc.weight": torch.full((2, 4), torch.nan)}, p)
)
hostile("infinite weights")(
    lambda p: torch.save(good() | {"fc.weight": torch.full((2, 4), torch.inf)}, p)
)
hostile("complex weights")(
    lambda p: torch.save(good() | {"fc.weight": torch.ones(2, 4, dtype=torch.complex64)}, p)
)
hostile("safetensors of an unknown type")(
    lambda p: safetensors(p, {"w": entry([1], 0, 4, "F4_E2M1")}, b"\0" * 4)
)
hostile("safetensors with bytes nobody owns")(
    lambda p: safetensors(p, {"w": entry([1], 0, 4)}, b"\0" * 4096)
)
hostile("shape that is not a number")(
    lambda p: safetensors(p, {"w": entry(["4"], 0, 16)}, b"\0" * 16)
)
hostile("no tensors at all")(lambda p: torch.save({"epoch": 3, "optimizer": {}}, p))
hostile("an image with the wrong suffix")(
    lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 64)
)
hostile("an empty file")(lambda p: p.write_bytes(b""))
hostile("an HTML error page (interrupted download)")(
    lambda p: p.write_bytes(b"<!DOCTYPE html><html>404</html>")
)

PROBE = """
import json, resource, signal, sys, time, traceback
from pathlib import Path
from dhbe.checkpoint import Checkpoint, completed
from dhbe.checkpoint.recognition import INFER
from dhbe.core.errors import DHBEError

OPEN = dict(classes=10, channels=3, image_size=32, normalization=None, order=None, clean=None,
            test=None, name="own")

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(key)).split()[1]) * 1024

def hang(*_):
    raise TimeoutError("a hang")

signal.signal(signal.SIGPROF, hang)
limit = status("VmSize") + 2**30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
out = Path("written")
out.mkdir()
for name in json.loads(sys.stdin.read()):
    Path("/proc/self/clear_refs").write_text("5")
    before, start = status("VmRSS"), time.process_time()
    signal.setitimer(signal.ITIMER_PROF, 30)
    written = None
    try:
        checkpoint = Checkpoint(Path(name))
        weights = {key: checkpoint.read(key) for key in checkpoint.places}
        written = str(checkpoint.write(out, weights))
        said = None
        victim = {"_target_": "dhbe.victim.checkpoint.CheckpointVictim", "path": name}
        completed({"victim": victim, "model": {"_target_": INFER}, "data": OPEN}, {})
    except DHBEError as error:
        said = str(error)
    except BaseException:
        said = "TRACEBACK " + traceback.format_exc()
    signal.setitimer(signal.ITIMER_PROF, 0)
    seconds = time.process_time() - start
    row = [name, said, seconds, (status("VmHWM") - before) / 2**20, written]
    print(json.dumps(row), flush=True)
"""


def verdicts(folder: Path, files: dict[str, Make] = FILES) -> list[dict[str, Any]]:
    """Make all files, read each with 1 GB to spare, write back what is accepted.

    Returns:
        per file: refusal (None: accepted), CPU s, MB, and the written file, if any.
    """
    names = {}
    for i, (description, make) in enumerate(files.items()):
        make(folder / f"{i:03}.pt")
        names[f"{i:03}.pt"] = description
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROBE],
        input=json.dumps(list(names)),
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    if len(rows) != len(names):
        raise RuntimeError(f"died at {list(names.values())[len(rows)]}: {done.stderr[-2000:]}")
    return [
        {"file": names[n], "said": said, "seconds": s, "mb": max(0.0, mb), "written": written}
        for n, said, s, mb, written in rows
    ]


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        rows = verdicts(Path(folder))
        print(f"executed: {(Path(folder) / MARK).exists()}; files: {len(rows)}\n")
    print("| file | refused, because | CPU s | MB |\n|---|---|---|---|")
    for row in rows:
        said = row["said"] or "ACCEPTED"
        reason = said.split(" state dict (", 1)[-1].split("); nothing in it", 1)[0]
        reason = reason.split("pt: ", 1)[-1].replace("|", "/").replace("\n", " ")[:110]
        print(f"| {row['file']} | {reason} | {row['seconds']:.2f} | {row['mb']:.0f} |")


if __name__ == "__main__":
    main()
