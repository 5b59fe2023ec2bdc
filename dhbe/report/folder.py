"""Reading a result folder, for all reports."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROLES = ("victim", "purified")
LABELS = {
    "acc": "clean accuracy (ACC)",
    "asr": "attack success rate (ASR)",
    "asr_conditional": "ASR among correctly classified",
    "ra": "robust accuracy (RA)",
}
"""The measured rates, in the order and the words of all tables."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One rate before and after the defense, with counts and Wilson 95 % intervals as text."""

    label: str
    before: str
    after: str
    before_detail: str
    after_detail: str


def read_metrics(folder: Path) -> dict[str, Any]:
    """The folder's ``metrics.json``."""
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return found


def percent(value: float | None) -> str:
    """Fraction -> ``12.3 %``; a dash where undefined."""
    return "–" if value is None else f"{100 * value:.1f} %"


def detail(count: dict[str, Any] | None) -> str:
    """Counts and interval of a rate, as text."""
    if count is None or not count["total"]:
        return ""
    low, high = count["wilson95"]
    return f"{count['hits']}/{count['total']}, 95 %: {100 * low:.1f}–{100 * high:.1f}"


def rows(metrics: dict[str, Any]) -> list[Row]:
    """Before/after rows of one run."""
    counts = metrics["counts"]
    return [
        Row(
            label=label,
            before=percent(metrics["victim"][name]),
            after=percent(metrics["purified"][name]),
            before_detail=detail(counts["victim"][name]),
            after_detail=detail(counts["purified"][name]),
        )
        for name, label in LABELS.items()
    ]


def reach_rows(reach: dict[str, list[dict[str, Any]]]) -> list[Row]:
    """Reach of the trigger network into each class, the highest of both networks first."""
    pairs = list(zip(*(reach[role] for role in ROLES), strict=True))

    def share(count: dict[str, Any]) -> float:
        return count["hits"] / count["total"] if count["total"] else 0.0

    order = sorted(range(len(pairs)), key=lambda c: -max(map(share, pairs[c])))
    return [
        Row(
            label=str(c),
            before=percent(share(pairs[c][0])),
            after=percent(share(pairs[c][1])),
            before_detail=detail(pairs[c][0]),
            after_detail=detail(pairs[c][1]),
        )
        for c in order
    ]
