"""What determines a result and what determines a victim: the hashes that name them."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from dhbe.core.paths import PACKAGE

CELL_EXCLUDED = ("paths", "logger", "force", "ablation")
"""Parts of a config that do not change a result, or only through other parts."""


SWITCHES = {"tf32": False, "compile": "never"}
"""Trainer options that change the rounding, and what leaves it alone: then they name no cell."""


def fingerprint(value: Any) -> str:
    """16 hex digits that name a JSON value."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def cell(tree: dict[str, Any]) -> str:
    """Name of a result: hash of everything in a config that can change it.

    Where a machine keeps its data sets and this package is left out of it, for data sets of known
    size; what others hold is only known by where they lie.
    """
    kept = {k: v for k, v in tree.items() if k not in CELL_EXCLUDED}
    data = kept.get("data")
    if isinstance(data, dict) and data.get("train_size"):
        roots = [tree["paths"]["data"], str(PACKAGE)]
        kept["data"] = data | {"source": _relative(data.get("source"), roots)}
    if isinstance(kept.get("trainer"), dict):
        idle = {"progress", "count"}
        idle |= {k for k, v in SWITCHES.items() if kept["trainer"].get(k) == v}
        kept["trainer"] = {k: v for k, v in kept["trainer"].items() if k not in idle}
    return fingerprint(kept)


def _relative(node: Any, roots: list[str]) -> Any:
    """The same node, paths in one of these folders relative to it."""
    if isinstance(node, dict):
        return {k: _relative(v, roots) for k, v in node.items()}
    for root in roots:
        if isinstance(node, str) and (node == root or node.startswith(f"{root}/")):
            return node.removeprefix(root)
    return node
