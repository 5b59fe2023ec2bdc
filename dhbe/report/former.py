"""Results of earlier versions, told in today's names and options.

Until 0.1 a config's scale was the end of its name (``dhbe_cpu``), the ablations of DHBE had names
of their own, and a schedule named its shape beside all keys that some shape needs.
"""

from __future__ import annotations

import re
from typing import Any

SCALED = re.compile(r"(.+)_(cpu|quick)")
ABLATION = re.compile(r"dhbe_(lambda|moves|patch|rate)\d+")
SHAPE_KEYS = ("schedule", "milestones", "decay", "end")
BESIDE = ("pattern_schedule", "generator_schedule", "injector_schedule")
"""Networks that learn within the victim's budget; theirs was given and ignored."""


def names(attack: str, defense: str) -> dict[str, str]:
    """Today's ``attack``, ``defense`` and ``scale``; without an ending it was as published."""
    found = {"attack": attack, "defense": defense, "scale": "paper"}
    for group in ("attack", "defense"):
        if scaled := SCALED.fullmatch(found[group]):
            found[group], found["scale"] = scaled.groups()
    if ABLATION.fullmatch(found["defense"]):
        found["defense"] = "dhbe"
    return found


def metrics(found: dict[str, Any]) -> dict[str, Any]:
    """A run's metrics with today's names; those of today stay as they are."""
    return found if "scale" in found else found | names(found["attack"], found["defense"])


def options(flat: dict[str, Any]) -> dict[str, Any]:
    """Today's options by path; those of today stay as they are."""
    found = dict(flat)
    for path, kind in flat.items():
        if path.endswith(".schedule") and kind in ("multistep", "cosine", "onecycle"):
            _reshape(found, path.removesuffix(".schedule"))
    return found


def _reshape(flat: dict[str, Any], path: str) -> None:
    """Put the shape of the schedule at ``path`` into its own options."""
    given = {k: flat.pop(f"{path}.{k}", None) for k in SHAPE_KEYS}
    kind, shape = given["schedule"], f"{path}.shape"
    if kind == "multistep" and given["milestones"]:
        flat |= {shape: "Steps"}
        flat |= {f"{shape}.{k}": given[k] for k in ("milestones", "decay")}
    elif kind == "cosine":
        flat |= {shape: "Cosine", f"{shape}.end": given["end"] or 0.0}
    else:
        flat[shape] = {"multistep": "Constant", "onecycle": "OneCycle"}[kind]
    flat.setdefault(f"{path}.weight_decay", 0.0)
    if path.rpartition(".")[2] in BESIDE:
        for key in ("epochs", "batch_size"):
            flat.pop(f"{path}.{key}", None)
