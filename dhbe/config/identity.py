"""What determines a result and what determines a victim: the one place that says it.

A config is first resolved completely (``dhbe.config.resolution``), then named by these hashes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dhbe.core.paths import PACKAGE

VICTIM = ("data", "model", "attack", "victim", "seed")
"""Parts of a config that make a victim, besides the precision."""
CASE = ("data", "model", "attack", "victim")
METHOD = ("defense", "budget", "trainer")
"""Config groups of what was attacked and of what erased it: reports group runs by these."""
CELL_EXCLUDED = ("paths", "logger", "force", "complete", "ablation")
"""Parts of a config that do not change a result, or only through other parts."""
SWITCHES = {"tf32": False, "compile": "never"}
"""Trainer options that change the rounding, and what leaves it as it is: then they name no cell."""
IDLE = ("progress", "recompute", "count")
"""Trainer options that change no result."""
NEUTRAL = ("_target_", "threads", "progress", "observe_every", "device", "root", "storage")
"""Options that change neither case nor method, or that the names tell."""
LATER = {
    **SWITCHES,
    "recompute": False,
    "count": False,
    "augmentation": "crop_flip",
    "poison_count": 0,
}
"""Options that older runs do not have; with these values they make no difference to them."""


def fingerprint(value: Any) -> str:
    """16 hex digits that name a JSON value."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def cell(tree: dict[str, Any]) -> str:
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
    """Everything that makes a trained victim what it is; ``VictimStore`` names it by this.

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
    recipe["attack"] = _without_later(recipe["attack"]) if attacked else None
    return recipe


def _without_later(options: dict[str, Any]) -> dict[str, Any]:
    """The options but those that older runs do not have and that make no difference to them."""
    return {k: v for k, v in options.items() if LATER.get(k, ...) != v}


def content(paths: Iterable[Path]) -> str:
    """Fingerprint of a user's files: their bytes; of folders names, sizes and times of all files.

    Empty if nothing is there; who reads them says so in its own words.
    """
    states = [_state(path) for path in paths if path.exists()]
    return fingerprint(states) if states else ""


def _state(path: Path) -> list[Any]:
    if path.is_file():
        with path.open("rb") as file:
            found = hashlib.sha256()
            while block := file.read(2**20):
                found.update(block)
        return [path.name, found.hexdigest()]
    files = [(file, file.stat()) for file in sorted(path.rglob("*")) if file.is_file()]
    return [[f.relative_to(path).as_posix(), s.st_size, s.st_mtime_ns] for f, s in files]


def _relative(node: Any, roots: list[str]) -> Any:
    """The same node, paths in one of these folders relative to it."""
    if isinstance(node, dict):
        return {k: _relative(v, roots) for k, v in node.items()}
    for root in roots:
        if isinstance(node, str) and (node == root or node.startswith(f"{root}/")):
            return node.removeprefix(root)
    return node
