"""Fuzz what reads other people's bytes: checkpoints, images, parquet tables, configs.

    python benchmarks/fuzz.py --minutes 60    # prints cases, CPU minutes and findings per target

A finding is an input that ends in anything but a result or the project's own error, or takes more
than 5 CPU seconds. Findings are kept as files; mend them and add them to the tests. Needs
``pip install -e .[fuzz]``.
"""

from __future__ import annotations

import _codecs
import argparse
import copy
import hashlib
import io
import re
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from numpy._core import multiarray
from PIL import Image

from benchmarks.hostile import FILES
from dhbe.api import composed
from dhbe.checkpoint import Checkpoint, completed
from dhbe.checkpoint.recognition import INFER
from dhbe.core.errors import DHBEError
from dhbe.data.images import decode
from dhbe.data.sources import Parquet
from dhbe.experiment.assembly import assemble
from dhbe.models.resnet import SmallResNet
from tests.support.writers import WRAPPINGS

OPEN = {
    "normalization": None,
    "order": None,
    "name": "own",
    "classes": None,
    "channels": 3,
    "image_size": None,
    "clean": None,
}
"""What a file is asked for."""
PLAIN: list[Any] = [
    *(argparse.Namespace, np.dtype, np.ndarray, multiarray.scalar),
    *(multiarray._reconstruct, set, frozenset, complex, torch.Size, _codecs.encode),
    *{type(np.dtype(t)) for t in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "?")},
]
"""What a file that we wrote may name."""
SLOW = 5.0
"""CPU seconds that make an input a finding."""


def mutated(seeds: list[bytes]) -> st.SearchStrategy[bytes]:
    """Seeds with bytes exchanged, runs cut out, repeated or inserted."""

    @st.composite
    def one(draw: st.DrawFn) -> bytes:
        raw = bytearray(draw(st.sampled_from(seeds)))
        for _ in range(draw(st.integers(0, 6))):
            at = draw(st.integers(0, max(0, len(raw) - 1)))
            length = draw(st.integers(0, 64))
            kind = draw(st.sampled_from(["set", "cut", "repeat", "insert"]))
            if kind == "set":
                raw[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            elif kind == "cut":
                del raw[at : at + length]
            elif kind == "repeat":
                raw[at:at] = raw[at : at + length]
            else:
                raw[at:at] = draw(st.binary(max_size=16))
        return bytes(raw)

    return one()


def checkpoint_seeds() -> list[bytes]:
    """Good files in all formats, and the small hostile ones."""
    weights = {"conv1.weight": torch.ones(4, 3, 3, 3), "fc.weight": torch.ones(2, 4)}
    seeds = []
    for legacy in (False, True):
        buffer = io.BytesIO()
        torch.save({"model": weights}, buffer, _use_new_zipfile_serialization=not legacy)
        seeds.append(buffer.getvalue())
    from safetensors.torch import save

    seeds.append(save(weights, {"format": "pt", "num_classes": "2", "mean": "[0.5]"}))
    network = SmallResNet(
        widths=[4, 4], blocks=1, stem_stride=1, classes=2, channels=3, image_size=16
    )
    sizes = {"classes": 2, "image_size": 16}
    for wrap in WRAPPINGS.values():  # with containers, arrays and states of objects beside them
        buffer = io.BytesIO()
        torch.save(wrap(network.state_dict(), **sizes), buffer)
        seeds.append(buffer.getvalue())
    large = re.compile(r"\d,000|million|bomb|sparse|collide|overlapping|500 stages|byte order of")
    with tempfile.TemporaryDirectory() as folder:
        for i, (description, make) in enumerate(FILES.items()):
            if large.search(description):
                continue
            file = Path(folder) / f"seed{i}"
            make(file)
            seeds.append(file.read_bytes())
    return seeds


def image_seeds() -> list[bytes]:
    """One small picture in each format."""
    picture = Image.fromarray(np.arange(432, dtype=np.uint8).reshape(12, 12, 3) % 251)
    seeds = []
    for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "PPM", "TIFF"):
        buffer = io.BytesIO()
        picture.save(buffer, kind)
        seeds.append(buffer.getvalue())
    return seeds


def table_seed() -> bytes:
    """A parquet table of two pictures."""
    images = [{"bytes": b, "path": "a.png"} for b in image_seeds()[:2]]
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": images, "label": [0, 1]}), buffer)
    return buffer.getvalue()


def read_checkpoint(folder: Path, raw: bytes) -> None:
    """Target: open the file, read every tensor, write it back, look for its network.

    What was written names nothing but plain data, arrays of numpy and namespaces.
    """
    file = folder / "given.pt"
    file.write_bytes(raw)
    checkpoint = Checkpoint(file)
    weights = {key: checkpoint.read(key) for key in checkpoint.places}
    written = checkpoint.write(folder, weights)
    if written.suffix != ".safetensors":
        with torch.serialization.safe_globals(PLAIN):
            torch.load(written, weights_only=True)
    victim = {"_target_": "dhbe.victim.checkpoint.CheckpointVictim", "path": str(file)}
    completed({"victim": victim, "model": {"_target_": INFER}, "data": OPEN}, {})


def read_image(folder: Path, raw: bytes) -> None:
    """Target: decode one image."""
    del folder
    assert decode("given", raw, 3, 8).shape == (3, 8, 8)


def read_table(folder: Path, raw: bytes) -> None:
    """Target: read one parquet table."""
    (folder / "given.parquet").write_bytes(raw)
    Parquet(root=str(folder), train="given.parquet", test="").load(
        "train", channels=3, size=8, stream=False
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
CHOICES = {
    "attack": ["badnets", "blend", "wanet", "input_aware", "ctrl", "adaptive_patch", "issba"],
    "defense": ["dhbe", "clp", "anp", "i_bau", "nad", "cetf", "trap_and_replace", "abl", "fip"],
}


def valid_trees() -> list[dict[str, Any]]:
    """Whole configs that are accepted: every attack and defense above."""
    longest = max(map(len, CHOICES.values()))
    rounds = [{g: names[i % len(names)] for g, names in CHOICES.items()} for i in range(longest)]
    found = [composed([f"{g}={name}" for g, name in choice.items()]) for choice in rounds]
    for tree in found:
        assemble(tree)
    return found


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a config holds a value; ``_target_`` names code and is as trusted as code."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    found = []
    for key, value in items:
        if key == "_target_":
            continue
        found.append((*path, key))
        if isinstance(value, (dict, list)):
            found += places(value, (*path, key))
    return found


def changed(trees: list[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Accepted configs with up to three values exchanged, moved or taken away."""
    numbers = st.sampled_from([-1, 0, 1, 2, 0.5, -0.5, 1e-9, 1e9, 2**40, 7])

    @st.composite
    def one(draw: st.DrawFn) -> dict[str, Any]:
        tree = copy.deepcopy(draw(st.sampled_from(trees)))
        for _ in range(draw(st.integers(0, 3))):
            *way, last = draw(st.sampled_from(places(tree)))
            node = tree
            for key in way:
                node = node[key]
            if isinstance(node, dict) and draw(st.integers(0, 4)) == 0:
                del node[last]
            else:
                node[last] = draw(numbers | JSON)
        return tree

    return one()


def check_config(folder: Path, tree: dict[str, Any]) -> None:
    """Target: check a config tree and build what it names; nothing is read from disk."""
    del folder
    assemble(tree)


def fuzz(
    name: str, strategy: st.SearchStrategy[object], target: Callable[..., None], minutes: float
) -> None:
    """Draw cases until the CPU time is used; print the target's row."""
    cases, refused = 0, 0
    findings: dict[str, str] = {}
    start = time.process_time()
    end = start + 60 * minutes
    with tempfile.TemporaryDirectory() as folder:

        def one(case: object) -> None:
            nonlocal cases, refused
            if time.process_time() > end:
                return
            cases += 1
            began = time.process_time()
            try:
                target(Path(folder), case)
            except DHBEError:
                refused += 1
            except Exception as error:
                where = f"{type(error).__name__}: {str(error)[:120]}"
                keep(findings, name, where, case)
            if time.process_time() - began > SLOW:
                keep(findings, name, "slow", case)

        while time.process_time() < end:
            run = given(strategy)(one)
            settings(
                max_examples=200,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )(run)()
    used = (time.process_time() - start) / 60
    print(f"| {name} | {cases:,} | {refused:,} | {used:.1f} | {len(findings)} |", flush=True)
    for what, file in findings.items():
        print(f"  {name}: {what} ({file})", flush=True)


def keep(findings: dict[str, str], name: str, what: str, case: object) -> None:
    """Write the first input of each kind of finding to ``outputs/fuzz``."""
    if what in findings:
        return
    raw = case if isinstance(case, bytes) else repr(case).encode()
    folder = Path("outputs/fuzz")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}-{hashlib.sha256(raw).hexdigest()[:12]}"
    file.write_bytes(raw)
    findings[what] = str(file)


SHARES = {"checkpoint": 0.5, "image": 0.2, "parquet": 0.15, "config": 0.15}
TARGETS: dict[str, Callable[[], tuple[st.SearchStrategy[Any], Callable[..., None]]]] = {
    "checkpoint": lambda: (mutated(checkpoint_seeds()), read_checkpoint),
    "image": lambda: (mutated(image_seeds()), read_image),
    "parquet": lambda: (mutated([table_seed()]), read_table),
    "config": lambda: (changed(valid_trees()), check_config),
}


def main() -> None:
    """Share the minutes among the targets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="CPU minutes in total")
    parser.add_argument("--targets", nargs="+", default=[*SHARES], choices=SHARES)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(
        "| target | cases | refused | CPU minutes | findings |\n|---|---|---|---|---|", flush=True
    )
    shares = {name: SHARES[name] for name in options.targets}
    for name, share in shares.items():
        strategy, target = TARGETS[name]()
        fuzz(name, strategy, target, options.minutes * share / sum(shares.values()))


if __name__ == "__main__":
    main()
