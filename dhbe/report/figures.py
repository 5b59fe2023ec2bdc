"""Figures over many runs, for the collected report."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dhbe.report.page import BLUE, GREY, ORANGE
from dhbe.report.tables import half_width, labels, order

MARKERS = "osv^Dpx*P<>hX+d8H1234"
CURVES = 40
"""Runs whose training curves are drawn at most."""


def figures(table: pd.DataFrame) -> Iterator[tuple[str, str, Figure]]:
    """(file name, caption, figure) of every figure that the results have something for."""
    table = labels(table)
    if table["der"].notna().any():
        yield "heat", "ASR and ACC after each defense, in percent (means over seeds)", heat(table)
        yield "pareto", "ACC over ASR; up and to the left is better", pareto(table)
    yield "seconds", "Seconds per defense (median, quartiles)", seconds(table)
    for column, caption in (
        ("poison_rate", "ASR over the poison rate (mean, 95 % interval)"),
        ("clean_images", "ASR over the number of clean images (mean, 95 % interval)"),
    ):
        attacked = table[table["attack"] != "none"]
        varied = attacked.groupby(["attack", "defense"])[column].nunique() > 1
        if varied.any():
            yield column, caption, over(attacked, column, varied[varied].index)
    drawn = curves(table)
    if drawn is not None:
        yield "curves", "Losses during the defense", drawn


def heat(table: pd.DataFrame) -> Figure:
    """Two maps, defenses down and attacks across; grey is not run."""
    rows = order(table)
    columns = sorted(table["attacked"].unique())
    room = 0.06 * max(map(len, rows)), 0.05 * max(map(len, columns))
    size = (1 + room[0] + 0.8 * len(columns), 1 + room[1] + 0.24 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    for axes, rate, shades in zip(
        figure.subplots(1, 2), ("asr", "acc"), ("cividis_r", "cividis"), strict=True
    ):
        wide = table.pivot_table(index="method_name", columns="attacked", values=f"purified_{rate}")
        values = 100 * wide.reindex(index=rows, columns=columns).to_numpy(dtype=float)
        axes.set_facecolor("#dddddd")
        axes.imshow(values, cmap=shades, vmin=0, vmax=100, aspect="auto")
        bright = values < 50 if rate == "asr" else values > 50
        for (i, j), value in np.ndenumerate(values):
            if not np.isnan(value):
                colour = "black" if bright[i, j] else "white"
                axes.text(j, i, f"{value:.0f}", ha="center", va="center", c=colour, fontsize=7)
        axes.set_title(rate.upper(), fontsize=9)
        axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize=7)
        shown = rows if rate == "asr" else [""] * len(rows)
        axes.set_yticks(range(len(rows)), shown, fontsize=7)
    return figure


def pareto(table: pd.DataFrame) -> Figure:
    """ACC over ASR of victims and purified networks, a marker per defense."""
    names = order(table)
    room = 0.08 * max(map(len, names))
    figure = Figure(figsize=(6 + room, max(5, 0.2 * len(names))), layout="constrained")
    axes = figure.subplots()
    axes.scatter(
        100 * table["victim_asr"], 100 * table["victim_acc"], c=ORANGE, s=12, label="victim"
    )
    for place, name in enumerate(names):
        group = table[table["method_name"] == name]
        axes.scatter(
            100 * group["purified_asr"],
            100 * group["purified_acc"],
            marker=MARKERS[place % len(MARKERS)],
            c=BLUE if place < len(MARKERS) else GREY,
            s=18,
            label=name,
        )
    axes.set(xlabel="ASR (%)", ylabel="ACC (%)", xlim=(-2, 102))
    axes.grid(color="#eeeeee")
    figure.legend(fontsize=7, loc="outside right upper")
    return figure


def seconds(table: pd.DataFrame) -> Figure:
    """Horizontal bars on a logarithmic axis."""
    runs = table.groupby("method_name")["seconds_defense"]
    middle = runs.median().sort_values().clip(lower=1e-2)
    reach = [abs(runs.quantile(q)[middle.index].clip(lower=1e-2) - middle) for q in (0.25, 0.75)]
    room = 0.06 * max(map(len, middle.index))
    figure = Figure(figsize=(5 + room, 1 + 0.22 * len(middle)), layout="constrained")
    axes = figure.subplots()
    axes.barh(middle.index, middle, xerr=reach, color=BLUE, ecolor=GREY)
    axes.set(xlabel="seconds", xscale="log")
    axes.tick_params(axis="y", labelsize=7)
    return figure


def over(table: pd.DataFrame, column: str, varied: pd.Index) -> Figure:
    """ASR over ``column``: a panel per attack, a line per defense; dashed is the victim."""
    attacks = sorted({a for a, _ in varied})
    figure = Figure(figsize=(4 * len(attacks), 3.4), layout="constrained")
    for axes, attack in zip(
        figure.subplots(1, len(attacks), squeeze=False)[0], attacks, strict=True
    ):
        for place, defense in enumerate(sorted(d for a, d in varied if a == attack)):
            group = table[(table["attack"] == attack) & (table["defense"] == defense)]
            line(axes, group, column, "purified_asr", MARKERS[place % len(MARKERS)], defense)
        line(axes, table[table["attack"] == attack], column, "victim_asr", "", "victim")
        axes.set(title=attack, xlabel=column.replace("_", " "), ylabel="ASR (%)", ylim=(-2, 102))
        axes.set_xscale("symlog", linthresh=0.01 if column == "poison_rate" else 10)
        axes.legend(fontsize=7)
    return figure


def line(axes: Axes, table: pd.DataFrame, x: str, y: str, marker: str, label: str) -> None:
    """Means with 95 % intervals of the mean where there are several values."""
    runs = (100 * table.set_index(x)[y]).groupby(level=0)
    found, half = runs.mean(), runs.agg(half_width).fillna(0)
    style: dict[str, Any] = {"marker": marker} if marker else {"linestyle": "--", "color": ORANGE}
    axes.errorbar(found.index, found, yerr=half, label=label, capsize=2, **style)


def curves(table: pd.DataFrame) -> Figure | None:
    """Losses over epochs of the first seed of each case and method; None without any."""
    first = table.sort_values("seed").drop_duplicates(["case", "method"]).head(CURVES)
    found: dict[str, list[tuple[str, pd.DataFrame]]] = {}
    for row in first.to_dict("records"):
        file = Path(row["folder"]) / "curves.csv"
        if not file.exists() or file.stat().st_size < 4:
            continue
        rows = pd.read_csv(file)
        rows = rows[rows["stage"] == "defense"]
        for name in rows.columns.difference(["stage", "epoch"]):
            if rows[name].notna().any():
                found.setdefault(name, []).append(
                    (f"{row['method_name']}, {row['attacked']}", rows)
                )
    if not found:
        return None
    figure = Figure(figsize=(8, 2.2 * len(found)), layout="constrained")
    for axes, (name, runs) in zip(
        figure.subplots(len(found), 1, squeeze=False)[:, 0], sorted(found.items()), strict=True
    ):
        for label, rows in runs:
            kept = rows[rows[name].notna()]
            axes.plot(kept["epoch"], kept[name], label=label, linewidth=0.8)
        axes.set_title(name, fontsize=8)
        if len(runs) <= 8:
            axes.legend(fontsize=6)
    return figure
