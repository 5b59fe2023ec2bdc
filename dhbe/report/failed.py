"""Runs that ended without a result: the records of sweeps, as rows that stand beside results.

A record names what was chosen and overridden, not all options. So its case and method are those of
the one finished run of the same names that the overrides do not contradict, or else its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from dhbe.config.identity import CASE as ATTACKED
from dhbe.config.identity import METHOD as ERASED
from dhbe.config.identity import NEUTRAL
from dhbe.report import folder as result
from dhbe.report import former
from dhbe.report.collect import CASE, METHOD, OPTIONS, RUN, digest, flatten
from dhbe.report.damaged import UNREADABLE, Damage, damage
from dhbe.report.folder import below
from dhbe.report.texts import printable

ABLATION = "ablation"
"""Root key of a sweep that changes one of several options at a time."""
SUFFIX = ".failed.json"
CAUSE = ["outcome", "error", "message", "overrides"]
SHOWN = [*CASE[:3], *METHOD[:2], "scale", "seed", *CAUSE]
"""Columns for readers."""


def failures(
    folders: Iterable[Path], finished: pd.DataFrame, damaged: list[Damage] | None = None
) -> pd.DataFrame:
    """One row per run at or below the folders whose last attempt failed; no finished ones.

    Columns are those of ``collect`` that are known, and ``outcome``: ``skipped`` if the config was
    to blame (the combination cannot be run), else ``failed``; ``error``, ``message``,
    ``overrides``.

    Args:
        finished: ``collect``'s table.
        damaged: takes records that cannot be read; they are logged as well.
    """
    kin = {
        "case": _kin(finished, "case", CASE[:3]),
        "method": _kin(finished, "method", METHOD[:2]),
    }
    rows = []
    files = {f for f in below(folders, hidden=True) if f.name[:1] == "." and f.match(f"*{SUFFIX}")}
    for file in sorted(files):
        cell = file.name[1:].removesuffix(SUFFIX)
        try:
            record = printable(json.loads(file.read_text()))
            if not result.finished(file.parent / record.get("folder", cell), cell):
                rows.append(_row(record, kin))
        except UNREADABLE as error:
            found = damage(file, error)
            if damaged is not None:
                damaged.append(found)
    columns = [*CASE, *METHOD, "scale", *RUN, *OPTIONS, "poison_rate", "epochs", *CAUSE]
    return pd.DataFrame(rows, columns=columns, dtype=object)


Kin = dict[tuple[str, ...], list[dict[str, Any]]]


def _kin(table: pd.DataFrame, column: str, names: list[str]) -> Kin:
    """One finished run of each hash, by names."""
    found: Kin = {}
    for row in table.drop_duplicates(column).to_dict("records"):
        named = {str(k): v for k, v in row.items()}
        found.setdefault(tuple(named[n] for n in names), []).append(named)
    return found


def _row(record: dict[str, Any], kin: dict[str, Kin]) -> dict[str, Any]:
    chosen = record["choices"]
    row: dict[str, Any] = {g: chosen.get(g) or "custom" for g in (*CASE[:3], *METHOD[:2])}
    row |= (
        {"scale": chosen["scale"]}
        if "scale" in chosen
        else former.names(row["attack"], row["defense"])
    )
    idle = {"attack"} if row["attack"] == "none" else set()  # its options have no effect
    for column, names, groups in (("case", CASE[:3], ATTACKED), ("method", METHOD[:2], ERASED)):
        said = _said(record["overrides"], set(groups) - idle)
        named = tuple(row[n] for n in names)
        row |= _placed(column, named, said, kin[column].get(named, []))
    row["poison_rate"] = row["case_options"].get("attack.poison_rate")
    epochs = (row["case_options"].get(f"victim.{k}epochs") for k in ("", "schedule."))
    row["epochs"] = next((n for n in epochs if n), None)
    row["outcome"] = "skipped" if record.get("config_mistake") else "failed"
    row |= {k: record[k] for k in ("seed", "error", "message")}
    return row | {"overrides": " ".join(record["overrides"])}


def _said(overrides: list[str], groups: set[str]) -> dict[str, Any]:
    """Options of the groups that were overridden, by path."""
    found: dict[str, Any] = {}
    for override in overrides:
        path, _, text = override.lstrip("+").partition("=")
        parts = path.split(".")
        if path == ABLATION:  # of several options at once
            found[path] = text
        elif len(parts) > 1 and parts[0] in groups and not set(parts) & set(NEUTRAL):
            group, name = path.rsplit(".", 1)
            found |= flatten({name: _value(text)}, group)
    return found


def _value(text: str) -> Any:
    """What Hydra reads; YAML alone takes ``1e-3`` for text."""
    try:
        value = yaml.safe_load(text)
        return float(value) if isinstance(value, str) else value
    except (ValueError, yaml.YAMLError):
        return text.strip("'\"")


def _placed(
    column: str, names: tuple[str, ...], said: dict[str, Any], kin: list[dict[str, Any]]
) -> dict[str, Any]:
    """The case or the method of a run that said this, among finished ones of the same names."""
    options = f"{column}_options"
    fits = [r for r in kin if all(r[options].get(k) == v for k, v in said.items())]
    if len(fits) == 1:
        found = {column: fits[0][column], options: fits[0][options]}
    else:
        alike = [r[options] for r in fits or kin] or [{}]
        agreed = {k: v for k, v in alike[0].items() if all(o.get(k) == v for o in alike)}
        known = agreed | said
        found = {column: digest([*names, "not finished"], known), options: known}
    if column == "method":
        used = {r["selection"] for r in fits or kin}
        agreed_on = used.pop() if len(used) == 1 else ""
        found["selection"] = said.get("defense.selection", agreed_on)
    return found
