"""The board: one JSON file per cell, with the figures that were claimed and those measured again.

A file is made from a result folder, and named after its attack, defense, seed and cell. Where the
board has the cell already, from another run, the new figures are *measured again*. A file whose
figures differ by more than chance, or that somebody marked, is ``unreliable``, with a reason. The
model is RobustBench's ``model_info``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import jinja2
import pandas as pd
import yaml
from annotated_types import Ge, Le
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from dhbe.config.identity import CELL_EXCLUDED
from dhbe.core.exit_status import UNWRITABLE
from dhbe.report.damaged import UNREADABLE, Damage, check, damage
from dhbe.report.folder import ROLES, below, detail, percent, read_metrics
from dhbe.report.legend import METRICS, explained
from dhbe.report.texts import printable

Share = Annotated[float, Ge(0), Le(1)]
SHOWN = ("acc", "asr", "ra")
"""Rates with a column."""
STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Count:
    """Hits among so many images, with Wilson's 95 % interval."""

    hits: Annotated[int, Ge(0)]
    total: Annotated[int, Ge(0)]
    wilson95: tuple[Share, Share] | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Figures:
    """What one run measured; a rate is None where it is not defined.

    Attributes:
        rates, counts: by role (``victim``, ``purified``) and rate (``acc``, ``asr``, ``ra``).
        seconds: of the defense.
    """

    rates: dict[str, dict[str, Share | None]]
    counts: dict[str, dict[str, Count | None]]
    der: Share | None
    seconds: Annotated[float, Ge(0)]
    peak_memory_mb: float | None
    device: str
    versions: dict[str, str]
    commit: str | None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Entry:
    """A cell of the board.

    Attributes:
        config: all options that determine the run, without places.
        unreliable: why the claim should not be relied upon; None where nothing speaks against it.
        remeasured: the claim's figures measured by another run; None where nobody has.
    """

    cell: str
    data: str
    model: str
    attack: str
    defense: str
    budget: str
    selection: str
    scale: str
    seed: Annotated[int, Ge(0)]
    poison_rate: Share | None
    claimed: Figures
    remeasured: Figures | None = None
    unreliable: str | None = None
    config: dict[str, Any]
    notes: list[str]

    @property
    def file(self) -> str:
        """Name of its file."""
        return f"{self.attack}.{self.defense}.{self.seed}.{self.cell}.json"

    @property
    def doubt(self) -> str | None:
        """Why the claim should not be relied upon, by hand or by what was measured again."""
        return self.unreliable or ", ".join(differing(self)) or None


ENTRY = TypeAdapter(Entry)


def differing(entry: Entry) -> list[str]:
    """Rates whose 95 % intervals do not meet when they are measured again."""
    if entry.remeasured is None:
        return []
    found = []
    for role in ROLES:
        for name in SHOWN:
            one, other = (
                f.counts.get(role, {}).get(name) for f in (entry.claimed, entry.remeasured)
            )
            if one is None or other is None or one.wilson95 is None or other.wilson95 is None:
                continue
            if one.wilson95[0] > other.wilson95[1] or other.wilson95[0] > one.wilson95[1]:
                rates = [percent(f.rates[role][name]) for f in (entry.claimed, entry.remeasured)]
                found.append(f"{role} {name.upper()} {rates[0]}, measured again {rates[1]}")
    return found


def entry_of(folder: Path) -> Entry:
    """The entry that a result folder makes.

    Raises:
        OSError, ValueError, KeyError: it cannot be read, or lacks something.
    """
    m = printable(read_metrics(folder))
    check(m)
    config = printable(yaml.load((folder / "config.yaml").read_text(), Loader=yaml.CSafeLoader))
    names = ("cell", "data", "model", "attack", "defense", "budget", "selection", "scale", "seed")
    claimed = {
        "rates": {r: {k: m[r][k] for k in SHOWN} for r in ROLES},
        "counts": {r: {k: m["counts"][r][k] for k in SHOWN} for r in ROLES},
        "der": m["der"],
        "seconds": m["seconds"]["defense"],
        "device": m.get("device_name") or m["device"],
        **{k: m[k] for k in ("peak_memory_mb", "versions", "commit")},
    }
    return ENTRY.validate_python(
        {
            **{k: m[k] for k in (*names, "poison_rate", "notes")},
            "claimed": claimed,
            "config": {k: placeless(v) for k, v in config.items() if k not in CELL_EXCLUDED},
        }
    )


def placeless(value: Any) -> Any:
    """The value with only the last part of absolute paths, which differ between machines."""
    if isinstance(value, dict):
        return {k: placeless(v) for k, v in value.items()}
    if isinstance(value, list):
        return [placeless(v) for v in value]
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value


def add(folders: Iterable[Path], board: Path, damaged: list[Damage]) -> list[Path]:
    """Write the files of all results at or below the folders; returns those that changed.

    Args:
        damaged: takes results that cannot be read; each is logged as well.

    Raises:
        OSError: a file cannot be written.
        ValueError: there is no result, or a file of the board is damaged.
    """
    found = sorted(f for f in below(folders) if f.name == "metrics.json")
    if not found:
        raise ValueError(f"no metrics.json below {', '.join(map(str, folders))}")
    board.mkdir(parents=True, exist_ok=True)
    written = []
    for metrics in found:
        try:
            new = entry_of(metrics.parent)
        except (*UNREADABLE, yaml.YAMLError) as error:
            damaged.append(damage(metrics.parent, error))
            continue
        file = board / new.file
        before = read(file) if file.exists() else None
        if before is not None and new.claimed in (before.claimed, before.remeasured):
            continue
        if before is not None:
            new = ENTRY.validate_python(
                ENTRY.dump_python(before) | {"remeasured": ENTRY.dump_python(new)["claimed"]}
            )
        file.write_bytes(ENTRY.dump_json(new, indent=1) + b"\n")
        written.append(file)
    return written


def read(file: Path) -> Entry:
    """An entry from its file.

    Raises:
        ValueError: it does not fit the schema; names the file, the field and what is allowed.
    """
    try:
        return ENTRY.validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(f"{file}: {field}: {first['msg']}; see dhbe/report/board.py") from error


def board_page(board: Path, out: Path) -> Path:
    """Render all entries of a board as one page that needs nothing else.

    Raises:
        OSError: the page cannot be written.
        ValueError: the board is empty, or one of its files is damaged.
    """
    entries = [read(f) for f in sorted(board.glob("*.json"))]
    if not entries:
        raise ValueError(f"--board {board}: no entries; add results: python -m dhbe.report FOLDER")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dhbe.report", "templates"), autoescape=True
    )
    rows = [(row(e), e, yaml.safe_dump(e.config, sort_keys=False)) for e in entries]
    page = environment.get_template("board.html").render(
        columns=list(rows[0][0]),
        rows=rows,
        metrics=METRICS,
        explained=explained,
        rates=rate_rows,
    )
    out.mkdir(parents=True, exist_ok=True)
    target = out / "board.html"
    target.write_text(page, encoding="utf-8", errors=UNWRITABLE)
    return target


def row(entry: Entry) -> dict[str, str]:
    """What the page shows of an entry that is not opened."""
    shown = {k: str(getattr(entry, k)) for k in ("data", "model", "attack", "defense")}
    shown |= {"poison_rate": percent(entry.poison_rate), "budget": entry.budget}
    shown |= {"selection": entry.selection, "seed": str(entry.seed)}
    for name in ("acc", "asr"):
        shown |= {f"{role} {name}": percent(entry.claimed.rates[role][name]) for role in ROLES}
    shown["der"] = percent(entry.claimed.der)
    shown["seconds"] = f"{entry.claimed.seconds:.0f}"
    state = "–" if entry.remeasured is None else "agrees"
    return shown | {"measured again": "differs" if differing(entry) else state}


def rate_rows(entry: Entry) -> pd.DataFrame:
    """Rates with counts and intervals, claimed and measured again."""
    runs = {"claimed": entry.claimed} | (
        {} if entry.remeasured is None else {"measured again": entry.remeasured}
    )
    table = []
    for role in ROLES:
        for name in SHOWN:
            line = {"": f"{role} {name.upper()}"}
            for title, found in runs.items():
                count = found.counts[role][name]
                text = detail(None if count is None else TypeAdapter(Count).dump_python(count))
                line[title] = f"{percent(found.rates[role][name])} ({text})" if text else "–"
            table.append(line)
    return pd.DataFrame(table)
