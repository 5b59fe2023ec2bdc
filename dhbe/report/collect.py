"""Many result folders -> one tidy table: a row per run, and what it shares with others.

Runs are grouped by the *case* (what was attacked: data, model, attack, victim's training) and the
*method* (what erased it: defense, budget, selection). Runs of one case and one method differ in the
seed alone. Where two cases or methods bear the same names, ``variant`` says which options differ.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from dhbe.report.folder import ROLES, read_metrics

CASE = ["data", "model", "attack", "attack_variant"]
METHOD = ["defense", "budget", "selection", "defense_variant"]
RUN = ["case", "method", "seed"]
RATES = ("acc", "asr", "ra", "asr_conditional")
ATTACKED = ("data", "model", "attack", "victim")
ERASED = ("defense", "budget", "trainer")
"""Config groups of a case and of a method."""
NEUTRAL = ("_target_", "threads", "progress", "observe_every", "device", "root", "storage")
"""Options that change neither, or that the names tell."""


def collect(folders: Iterable[Path]) -> pd.DataFrame:
    """One row per finished run at or below the given folders; of equal runs the newest.

    Rates are fractions; columns ``victim_acc``, ``purified_asr`` and so on. ``case`` and ``method``
    are hashes of the options behind the names.
    """
    files = {m for f in folders for m in f.rglob("metrics.json") if m.parent.name[:1] != "."}
    found = [m.parent for m in sorted(files, key=lambda m: (m.stat().st_mtime, m))]
    options: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor() as pool:
        rows = list(pool.map(lambda folder: _row(folder, options), found))
    table = pd.DataFrame(rows)
    if table.empty:
        return table
    table = table.drop_duplicates(RUN, keep="last").reset_index(drop=True)
    for kind, names in (("attack", ("data", "model", "attack")), ("defense", METHOD[:3])):
        column = "case" if kind == "attack" else "method"
        variant = _variants(table, column, list(names), options)
        table[f"{kind}_variant"] = [variant[name] for name in table[column]]
    return table


def _row(folder: Path, options: dict[str, dict[str, Any]]) -> dict[str, Any]:
    m = read_metrics(folder)
    file = folder / "config.yaml"
    config = yaml.load(file.read_text(), Loader=yaml.CSafeLoader) if file.exists() else {}
    if m["attack"] == "none":
        config["attack"] = None  # poisoning options have no effect
    row = {k: m[k] for k in ("data", "model", "attack", "defense", "budget", "selection")}
    row |= {k: m[k] for k in ("seed", "poison_rate", "der")}
    row |= {f"{r}_{k}": m[r][k] for r in ROLES for k in RATES}
    row["floor_asr"] = m.get("floor", {}).get("asr")
    row["epochs"] = config.get("victim", {}).get("epochs")
    row["clean_images"] = _clean_images(config)
    row |= {f"seconds_{k}": v for k, v in m["seconds"].items()}
    row["peak_memory_mb"] = m.get("peak_memory_mb")
    for column, names, groups in (("case", CASE, ATTACKED), ("method", METHOD, ERASED)):
        flat = _flatten({g: config.get(g) for g in groups})
        named = [m[name] for name in names if name in m]
        text = json.dumps([named, flat], sort_keys=True, default=str)
        row[column] = hashlib.sha256(text.encode()).hexdigest()[:12]
        options.setdefault(row[column], flat)
    return row | {"commit": m["commit"], "folder": str(folder)}


def _clean_images(config: dict[str, Any]) -> float | None:
    """Number of clean images that the budget grants."""
    budget, data = config.get("budget"), config.get("data") or {}
    if budget is None:
        return None
    per_class = budget.get("per_class", 0) * data.get("classes", 0)
    return float(round(budget.get("fraction", 0) * data.get("train_size", 0)) + per_class)


def _flatten(node: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {path: node}
    found: dict[str, Any] = {}
    for key, value in node.items():
        if key not in NEUTRAL:
            found |= _flatten(value, f"{path}.{key}" if path else str(key))
    return found


def _variants(
    table: pd.DataFrame, column: str, names: list[str], options: dict[str, dict[str, Any]]
) -> dict[str, str]:
    """For each hash in ``column``: the options that tell it from others of the same names."""
    kin: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for row in table[[column, *names]].itertuples(index=False):
        kin[tuple(row[1:])].add(row[0])
    found: dict[str, str] = {}
    for group in kin.values():
        keys = sorted({k for name in group for k in options[name]})
        values = {k: {repr(options[name].get(k)) for name in group} for k in keys}
        differing = [k for k in keys if len(values[k]) > 1]
        for name in group:
            shown = (f"{k.partition('.')[2] or k}={options[name].get(k)}" for k in differing)
            found[name] = ", ".join(shown)
    return found


def failures(folders: Iterable[Path]) -> pd.DataFrame:
    """One row per run below the folders whose last attempt failed, with the cause."""
    files = sorted({f for folder in folders for f in folder.rglob(".*.failed.json")})
    rows = []
    for file in files:
        record = json.loads(file.read_text())
        chosen = {k: record["choices"].get(k) for k in ("data", "model", "attack", "defense")}
        cause = {"seed": record["seed"], "error": record["error"], "message": record["message"]}
        rows.append(chosen | cause | {"overrides": " ".join(record["overrides"])})
    return pd.DataFrame(rows)


def select(table: pd.DataFrame, conditions: Iterable[str]) -> pd.DataFrame:
    """Rows for which every ``column=value[,value...]`` holds.

    Raises:
        ValueError: no such column.
    """
    for condition in conditions:
        column, _, values = condition.partition("=")
        if column not in table:
            raise ValueError(f"--where {condition}: no such column; there are {list(table)}")
        table = table[table[column].astype(str).isin(values.split(","))]
    return table


def merge(old: Path, new: pd.DataFrame) -> pd.DataFrame:
    """Rows of a former ``results.csv``, replaced where the same run was made again."""
    if old.exists():
        new = pd.concat([pd.read_csv(old, keep_default_na=True), new], ignore_index=True)
        variants = ["attack_variant", "defense_variant"]
        new[variants] = new[variants].fillna("")
    return new.drop_duplicates(RUN, keep="last").reset_index(drop=True)
