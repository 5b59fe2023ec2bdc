"""Result folders and records that cannot be read: a report is about the others, and lists these."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from dhbe.report.folder import ROLES, below
from dhbe.report.texts import printable

TITLE = "Damaged, not counted"
TEXTS = ("data", "model", "attack", "defense", "budget", "selection")
LEFT = ("predictions.npz", "curves.csv", "purified.safetensors")
"""Files that nothing but a result folder has."""
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError)
"""What the readers of JSON, YAML, CSV and numpy's files raise; see also ``zipfile.BadZipFile``."""
log = logging.getLogger(__name__)


class Damage(NamedTuple):
    """What cannot be read, and why."""

    path: str
    cause: str


def damage(path: Path, error: Exception) -> Damage:
    """The error in one line, logged as well."""
    said = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyError):
        said = f"lacks {said}"
    found = Damage(printable(str(path)), printable(said[:300]))
    log.warning("%s: damaged, left out of the report: %s", *found)
    return found


def listed(found: Iterable[Damage]) -> pd.DataFrame:
    """Table for readers."""
    return pd.DataFrame(sorted(set(found)), columns=["path", "cause"])


def half_deleted(folders: Iterable[Path]) -> list[Damage]:
    """Result folders that have lost their ``metrics.json``."""
    there = {f.parent for f in below(folders) if f.name in LEFT}
    lost = [p for p in there if p.name[:1] != "." and not os.path.lexists(p / "metrics.json")]
    return [damage(p, FileNotFoundError("metrics.json is missing")) for p in sorted(lost)]


def check(metrics: dict[str, Any]) -> None:
    """What every table rests upon.

    Raises:
        KeyError: something is missing.
        ValueError: a value is none that a run writes.
    """
    for name in TEXTS:
        _expect(isinstance(metrics[name], str), name, metrics[name], "text")
    seed = metrics["seed"]
    _expect(isinstance(seed, int) and not isinstance(seed, bool), "seed", seed, "an integer")
    for role in ROLES:
        _expect(isinstance(metrics[role], dict), role, metrics[role], "rates")
        for name, rate in metrics[role].items():
            fits = rate is None or (_number(rate) and 0 <= rate <= 1)
            _expect(fits, f"{role}.{name}", rate, "a fraction, 0..1")
    _expect(isinstance(metrics["seconds"], dict), "seconds", metrics["seconds"], "numbers")
    for name, value in metrics["seconds"].items():
        _expect(_number(value), f"seconds.{name}", value, "a number")
    _expect(metrics["der"] is None or _number(metrics["der"]), "der", metrics["der"], "a number")


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _expect(fits: bool, name: str, value: object, allowed: str) -> None:
    if not fits:
        raise ValueError(f"metrics.json: {name}={str(value)[:80]}: expected {allowed}")
