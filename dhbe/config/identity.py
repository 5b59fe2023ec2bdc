"""Identity of results and victims: which settings enter their hashes.

A config is first resolved completely (``dhbe.config.resolution``), then named by these hashes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dhbe.config.linked import named_files
from dhbe.core.folders import below
from dhbe.core.paths import PACKAGE

VICTIM = ("data", "model", "attack", "victim", "seed")
"""Parts of a config that make a victim, besides the precision."""
TOLD = ("path", "assumed")
"""Of a file that a victim starts from: its content, ``sha256``, names it, not its place."""
CASE = ("data", "model", "attack", "victim")
METHOD = ("defense", "budget", "trainer")
"""Config groups of what was attacked and of what erased it: reports group runs by these."""
CELL_EXCLUDED = ("paths", "logger", "force", "complete", "ablation")
"""Parts of a config that do not change a result, or only through other parts."""
SWITCHES = {"tf32": False, "compile": "never"}
"""Trainer options that change the rounding, and what leaves it as it is: then they name no cell."""
IDLE = ("progress", "recompute", "count")
"""Trainer options that change no result."""
NEUTRAL = (
    *("_target_", "threads", "progress", "observe_every", "device", "root", "storage"),
    "assumed",
)
"""Options that change neither case nor method, or that the names tell."""
LATER = {
    **SWITCHES,
    "recompute": False,
    "count": False,
    "augmentation": "crop_flip",
    "poison_count": 0,
}
"""Options that older runs do not have; with these values they make no difference to them."""


SMALL = 64 * 2**20
"""Bytes of a folder whose files are read to know it."""


def fingerprint(value: Any) -> str:
    """16 hex digits that name a JSON value."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def cell_name(tree: dict[str, Any]) -> str:
    """Name of a result: hash of everything in a resolved config that can change it.

    Where a machine keeps its data sets and this package is left out of it, for data sets of known
    size; what others hold is known by where they lie and by the state of their files.
    """
    kept = {k: v for k, v in tree.items() if k not in CELL_EXCLUDED}
    data = kept.get("data")
    if isinstance(data, dict) and data.get("train_size"):
        roots = [tree["paths"]["data"], str(PACKAGE)]
        kept["data"] = data | {"source": _relative(data.get("source"), roots)}
    if isinstance(kept.get("attack"), dict):
        kept["attack"] = _without_later(kept["attack"])
    if isinstance(kept.get("trainer"), dict):
        idle = {*IDLE, *(k for k, v in SWITCHES.items() if kept["trainer"].get(k) == v)}
        kept["trainer"] = {k: v for k, v in kept["trainer"].items() if k not in idle}
    return fingerprint(kept)


def victim_recipe(
    tree: dict[str, Any], *, attacked: bool, images: str, precision: str, tf32: bool
) -> dict[str, Any]:
    """All settings that determine a trained victim; ``VictimStore`` names it by their hash.

    Args:
        attacked: whether the attack is active; the options of an idle one have no effect.
        images: fingerprint of the training images, whatever source they come from.
        precision, tf32: of the training, as the hardware has them.
    """
    recipe = {k: tree[k] for k in VICTIM} | {"precision": precision}
    if tf32:
        recipe["tf32"] = True
    recipe["data"] = {k: v for k, v in recipe["data"].items() if k not in ("source", "storage")}
    recipe["images"] = images
    recipe["victim"] = {k: v for k, v in recipe["victim"].items() if k not in TOLD}
    source = tree["data"].get("source") or {}
    if source.get("content"):  # a user's files: the fingerprint sees but some of the images
        recipe["content"] = source["content"]
    recipe["attack"] = _without_later(recipe["attack"]) if attacked else None
    return recipe


def _without_later(options: dict[str, Any]) -> dict[str, Any]:
    """The options but those that older runs do not have and that make no difference to them."""
    return {k: v for k, v in options.items() if LATER.get(k, ...) != v}


def content(paths: Iterable[Path]) -> str:
    """Fingerprint of a user's files: their bytes; of folders names, sizes and times of all files.

    Links are followed. Small folders are known by the bytes of their files as well: an archive may
    unpack another version with the same times. Of tables that name image files, these count too.
    Empty if nothing is there, and what cannot be read counts as such; who reads the files says so
    in its own words.
    """
    states = [_state(path) for path in paths if os.path.exists(path)]
    return fingerprint(states) if states else ""


def _state(path: Path) -> list[Any]:
    if not os.path.isdir(path):
        named = named_files(path) if path.suffix == ".parquet" else []
        return [path.name, _digest(path), *_states({str(f): f for f in named})]
    unread: list[str] = []
    files = [f for f in below(path, lambda e: unread.append(str(e))) if not os.path.isdir(f)]
    return _states({f.relative_to(path).as_posix(): f for f in files}) + unread


def _states(files: dict[str, Path]) -> list[Any]:
    found: list[list[Any]] = [[name, *_stamp(f)] for name, f in files.items()]
    if sum(state[1] for state in found) <= SMALL:
        return [[*state, _digest(f)] for state, f in zip(found, files.values(), strict=True)]
    return found


def _stamp(file: Path) -> tuple[int, int]:
    """Size and time; zeros of a broken link."""
    try:
        about = file.stat()
    except OSError:
        return 0, 0
    return about.st_size, about.st_mtime_ns


def _digest(path: Path) -> str:
    """Of a file's bytes; empty for what is no file or cannot be read."""
    found = hashlib.sha256()
    try:
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            while block := file.read(2**20):
                found.update(block)
    except OSError:
        return ""
    return found.hexdigest()


def _relative(node: Any, roots: list[str]) -> Any:
    """The same node, paths in one of these folders relative to it."""
    if isinstance(node, dict):
        return {k: _relative(v, roots) for k, v in node.items()}
    for root in roots:
        if isinstance(node, str) and (node == root or node.startswith(f"{root}/")):
            return node.removeprefix(root)
    return node
