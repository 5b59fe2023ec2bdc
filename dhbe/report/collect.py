"""Many result folders -> one tidy table: a row per run, and what it shares with others.

Runs are grouped by the *case* (what was attacked: data, model, attack, victim's training) and the
*method* (what erased it: defense, budget, selection). Runs of one case and one method differ in the
seed alone. Where two cases or methods bear the same names, ``variant`` says which options differ
(or, where those are not known, the start of the hash). The scale is told beside them; as far as it
changed anything, the options hold it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from dhbe.config.identity import CASE as ATTACKED
from dhbe.config.identity import LATER, NEUTRAL
from dhbe.config.identity import METHOD as ERASED
from dhbe.report import former
from dhbe.report.damaged import UNREADABLE, Damage, check, damage, half_deleted
from dhbe.report.folder import ROLES, below, read_metrics, speeds
from dhbe.report.texts import original, printable

CASE = ["data", "model", "attack", "attack_variant"]
METHOD = ["defense", "budget", "selection", "defense_variant"]
RUN = ["case", "method", "seed"]
OPTIONS = ["case_options", "method_options"]
"""Columns of dictionaries: the options behind the hashes, by path."""
OPTIONS_FILE = "options.json"
"""Beside ``results.csv``: options by hash."""
RATES = ("acc", "asr", "ra", "asr_conditional")


def collect(folders: Iterable[Path], damaged: list[Damage] | None = None) -> pd.DataFrame:
    """One row per finished run at or below the given folders; of equal runs the newest.

    Rates are fractions; columns ``victim_acc``, ``purified_asr`` and so on. ``case`` and ``method``
    are hashes of the options behind the names, which are in ``case_options`` and
    ``method_options``.

    Args:
        damaged: takes what cannot be read; it is logged as well.
    """
    folders = list(folders)
    files = {m for m in below(folders) if m.name == "metrics.json" and m.parent.name[:1] != "."}
    found = [m.parent for m in sorted(files, key=lambda m: (_time(m), m))]
    options: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor() as pool:
        read = list(pool.map(lambda folder: _attempt(folder, options), found))
    if damaged is not None:
        damaged += half_deleted(folders)
        damaged += [r for r in read if isinstance(r, Damage)]
    rows = [r for r in read if not isinstance(r, Damage)]
    if not rows:
        return pd.DataFrame(columns=[*CASE, *METHOD, "scale", *RUN, *OPTIONS, "der"])
    table = pd.DataFrame(rows).drop_duplicates(RUN, keep="last").reset_index(drop=True)
    return relabel(table)[0]


def relabel(*tables: pd.DataFrame) -> list[pd.DataFrame]:
    """The tables with ``attack_variant`` and ``defense_variant`` that tell all their rows apart."""
    tables = tuple(t.copy() for t in tables)
    for column, names in (("case", CASE), ("method", METHOD)):
        *given, variant = names
        needed = [column, f"{column}_options", *given, variant, "scale"]
        texts = _variants(pd.concat([t.reindex(columns=needed) for t in tables]), column, names)
        for table in tables:
            table[variant] = [texts[name] for name in table[column]]
    return list(tables)


def _time(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:  # a dangling link, or deleted in this moment
        return 0.0


def _attempt(folder: Path, options: dict[str, dict[str, Any]]) -> dict[str, Any] | Damage:
    """A row, or why there is none."""
    try:
        return _row(folder, options)
    except yaml.YAMLError as error:
        return damage(folder / "config.yaml", error)
    except UNREADABLE as error:
        return damage(folder, error)


def _row(folder: Path, options: dict[str, dict[str, Any]]) -> dict[str, Any]:
    m = printable(read_metrics(folder))
    earlier = "scale" not in m
    m = former.metrics(m)
    check(m)
    config = printable(yaml.load((folder / "config.yaml").read_text(), Loader=yaml.CSafeLoader))
    if not isinstance(config, dict):
        raise ValueError("config.yaml: holds no options")
    if m["attack"] == "none":
        config["attack"] = None  # poisoning options have no effect
    row = {k: m[k] for k in ("data", "model", "attack", "defense", "budget", "selection", "scale")}
    row |= {k: m[k] for k in ("seed", "poison_rate", "der")}
    row |= {f"{r}_{k}": m[r][k] for r in ROLES for k in RATES}
    baseline = m.get("clean_baseline") or m.get("floor") or {}  # older results say floor
    row["clean_baseline_asr"] = baseline.get("asr")
    victim = config.get("victim", {})
    schedule = victim.get("schedule")  # in former configs the name of a shape
    row["epochs"] = (schedule if isinstance(schedule, dict) else victim).get("epochs")
    row["clean_images"] = _clean_images(config)
    row |= {f"seconds_{k}": v for k, v in m["seconds"].items()}
    row |= {f"{k}_{s}": v for s in ("victim", "defense") for k, v in speeds(m, s).items()}
    row["peak_memory_mb"] = m.get("peak_memory_mb")
    for column, names, groups in (("case", CASE, ATTACKED), ("method", METHOD, ERASED)):
        flat = flatten({g: config.get(g) for g in groups})
        flat = former.options(flat) if earlier else flat
        named = [m[name] for name in names if name in m]
        row[column] = digest(named, flat)
        row[f"{column}_options"] = options.setdefault(row[column], flat)
    return row | {"commit": m["commit"], "folder": printable(str(folder))}


def digest(names: list[str], options: dict[str, Any]) -> str:
    """Hash of a case or a method."""
    text = json.dumps([names, options], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _clean_images(config: dict[str, Any]) -> float | None:
    """Number of clean images that the budget grants."""
    budget, data = config.get("budget"), config.get("data") or {}
    if budget is None:
        return None
    per_class = budget.get("per_class", 0) * data.get("classes", 0)
    size = data.get("limit") or data.get("train_size", 0)
    return float(round(budget.get("fraction", 0) * size) + per_class)


def flatten(node: Any, path: str = "") -> dict[str, Any]:
    """Nested options -> options by path, without those that make no difference."""
    if not isinstance(node, dict):
        return {path: node}
    found: dict[str, Any] = {}
    for key, value in node.items():
        if key == "_target_" and path.endswith(".shape"):
            found[path] = value.rpartition(".")[2]
        elif key not in NEUTRAL and LATER.get(key, ...) != value:
            found |= flatten(value, f"{path}.{key}" if path else str(key))
    return found


def _variants(table: pd.DataFrame, column: str, names: list[str]) -> dict[str, str]:
    """For each hash in ``column``: the scale or the options that tell it from others so named.

    Where its options are not known, the former text; where texts are the same, also the hash.
    """
    options: dict[str, dict[str, Any]] = dict(
        zip(table[column], table[f"{column}_options"], strict=True)
    )
    *given, variant = names
    before = dict(zip(table[column], table[variant].fillna(""), strict=True))
    scale = dict(zip(table[column], table["scale"], strict=True))
    kin: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for row in table[[column, *given]].itertuples(index=False):
        kin[tuple(row[1:])].add(row[0])
    found: dict[str, str] = {}
    for group in kin.values():
        known = [options[name] for name in group if options[name]]
        keys = sorted({k for o in known for k in o})
        differing = [k for k in keys if len({repr(o.get(k)) for o in known}) > 1]
        if len({scale[name] for name in group}) == len(group) > 1:
            found |= {name: f"scale={scale[name]}" for name in group}
            continue
        texts = {}
        for name in group:
            own = options[name]
            shown = [f"{k.partition('.')[2] or k}={own[k]}" for k in differing if k in own]
            texts[name] = ", ".join(shown) if own else before[name]
        times = Counter(texts.values())
        for name, text in texts.items():
            found[name] = text if times[text] == 1 else f"{text} #{name[:6]}".strip()
    return found


def select(
    table: pd.DataFrame, conditions: Iterable[str], known: Iterable[str] = ()
) -> pd.DataFrame:
    """Rows for which every ``column=value[,value...]`` holds.

    Args:
        known: columns that may be missing here; no row fulfils a condition on a missing one.

    Raises:
        ValueError: no such column.
    """
    columns = list(dict.fromkeys([*table, *known]))
    for condition in conditions:
        column, _, values = condition.partition("=")
        if column not in columns or column in OPTIONS:
            there = [c for c in columns if c not in OPTIONS]
            raise ValueError(f"--where {condition}: no such column; there are {there}")
        found = table.get(column, pd.Series(index=table.index, dtype=object))
        table = table[found.astype(str).isin(values.split(","))]
    return table


def merge(old: Path, new: pd.DataFrame) -> pd.DataFrame:
    """Rows of a former ``results.csv``, replaced where the same run was made again."""
    if old.exists():
        text = dict.fromkeys(("case", "method", "commit"), str)  # some hashes look like numbers
        kept = original(pd.read_csv(old, keep_default_na=True, dtype=text))
        kept = kept.rename(columns={"floor_asr": "clean_baseline_asr"})  # of older versions
        file = old.with_name(OPTIONS_FILE)
        options = json.loads(file.read_text()) if file.exists() else {}
        for column in ("case", "method"):
            kept[f"{column}_options"] = [options.get(name, {}) for name in kept[column]]
        if "scale" not in kept:
            kept = renamed(kept)
        new = pd.concat([t for t in (kept, new) if len(t)] or [new], ignore_index=True)
    return relabel(new.drop_duplicates(RUN, keep="last").reset_index(drop=True))[0]


def renamed(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of an earlier version with today's names, options and hashes."""
    table = table.copy()
    pairs = zip(table["attack"], table["defense"], strict=True)
    today = [former.names(*p) for p in pairs]
    for column in ("attack", "defense", "scale"):
        table[column] = [found[column] for found in today]
    for column, names in (("case", CASE), ("method", METHOD)):
        given = [n for n in names if not n.endswith("_variant")]
        flats = [former.options(o) for o in table[f"{column}_options"]]
        table[f"{column}_options"] = pd.Series(flats, index=table.index, dtype=object)
        table[column] = [
            digest(row, flat) if flat else name
            for name, flat, row in zip(
                table[column], flats, table[given].to_numpy().tolist(), strict=True
            )
        ]
    return table
