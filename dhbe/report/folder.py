"""Reading a result folder, for all reports."""

from __future__ import annotations

import errno
import json
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dhbe.core import folders as core

log = logging.getLogger(__name__)
ROLES = ("victim", "purified")
LABELS = {
    "acc": "clean accuracy (ACC)",
    "asr": "attack success rate (ASR)",
    "asr_conditional": "ASR among correctly classified",
    "ra": "robust accuracy (RA)",
}
"""The measured rates, in the order and the words of all tables."""
PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One rate before and after the defense, with counts and Wilson 95 % intervals as text."""

    label: str
    before: str
    after: str
    before_detail: str
    after_detail: str


def below(folders: Iterable[Path], *, hidden: bool = False) -> Iterator[Path]:
    """Files at or below result folders, links followed; what cannot be read is said and left out.

    Args:
        hidden: those of unfinished runs and of failures as well.
    """

    def said(error: OSError) -> None:
        if error.errno != errno.ELOOP:  # what lies there is read already
            log.warning("%s: left out (%s)", error.filename, error.strerror)

    for folder in folders:
        yield from core.below(folder, said, hidden=hidden)


def read_metrics(folder: Path) -> dict[str, Any]:
    """The folder's ``metrics.json``.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    found = json.loads((folder / "metrics.json").read_text())
    if not isinstance(found, dict):
        raise ValueError("metrics.json: holds no JSON object")
    return found


def finished(folder: Path, cell: str) -> bool:
    """Whether the folder holds the result of this cell; that of another one does not count.

    Results of before they told their cell lie in a folder of its name.
    """
    try:
        return bool(read_metrics(folder).get("cell", folder.name) == cell)
    except (OSError, ValueError):
        return False


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


def speeds(metrics: dict[str, Any], stage: str) -> dict[str, float | None]:
    """Work of a stage's trainings: FLOP, bytes, FLOP/s and share of the devices' bf16 peak.

    None where it was not counted or nobody knows; the share of a victim trained by another run,
    perhaps on another device, as well.
    """
    flops, traffic, seconds = (
        metrics.get(name, {}).get(stage) for name in ("flops", "bytes", "trained_seconds")
    )
    speed = flops / seconds if flops and seconds else None
    here = stage != "victim" or not metrics.get("cached_victim", True)
    peak = metrics.get("peak_flops") if here else None
    share = speed / peak if speed and peak else None
    return {"flops": flops, "bytes": traffic, "flops_per_second": speed, "share_of_peak": share}


def work(metrics: dict[str, Any], stage: str) -> str:
    """These figures as text; a dash where nothing was counted."""
    found = speeds(metrics, stage)
    if found["flops"] is None or found["bytes"] is None:
        return "–"
    parts = [f"{si(found['flops'])}FLOP, {si(found['bytes'])}B"]
    if (speed := found["flops_per_second"]) is not None:
        share = found["share_of_peak"]
        of_peak = "" if share is None else f" ({percent(share)} of bf16 peak)"
        parts.append(f"{si(speed)}FLOP/s{of_peak}")
    return "; ".join(parts)


def si(value: float) -> str:
    """Three digits and a decimal prefix: 1.23e12 -> ``1.23 T``."""
    value = float(f"{value:.3g}")
    power = int(math.log10(value) / 3) if value > 1 else 0
    return f"{value / 1000**power:.3g} {PREFIXES[power]}"


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
