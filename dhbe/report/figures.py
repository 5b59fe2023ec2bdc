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

from dhbe.report.collect import CASE, digest, relabel
from dhbe.report.damaged import UNREADABLE, damage
from dhbe.report.page import BLUE, GREY, sparse, style
from dhbe.report.picture import gallery
from dhbe.report.tables import half_width, labels, order
from dhbe.report.texts import plain_ticks

CURVES = 40
"""Runs whose training curves are drawn at most."""
ACROSS = 4
"""Panels beside each other."""
VARIED = {
    "poison_rate": ("case", ("attack.poison_rate",)),
    "clean_images": ("method", ("budget.name", "budget.fraction", "budget.per_class")),
}
"""What a figure varies: whether it belongs to the case or the method, and the options behind it."""


def figures(table: pd.DataFrame) -> Iterator[tuple[str, str, Figure]]:
    """(file name, caption, figure) of every figure that the results have something for."""
    table = labels(table)
    if table["der"].notna().any():
        yield "heat", "ASR and ACC after each defense, in percent (means over seeds)", heat(table)
        yield "pareto", "ACC over ASR; up and to the left is better", pareto(table)
    yield "seconds", "Seconds per defense (median, quartiles)", seconds(table)
    for column, caption in (
        ("poison_rate", "ASR over the poison rate (mean, 95 % interval; dashed: victim)"),
        (
            "clean_images",
            "ASR over the number of clean images (mean, 95 % interval; dashed: victim)",
        ),
    ):
        drawn = over(table[table["attack"] != "none"], column)
        if drawn is not None:
            yield column, caption, drawn
    drawn = gallery(table)
    if drawn is not None:
        yield "examples", "Test images of each attack, clean and triggered", drawn
    drawn = curves(table)
    if drawn is not None:
        yield "curves", "Losses during the defense", drawn


def heat(table: pd.DataFrame) -> Figure:
    """Two maps, defenses down and attacks across; grey has no result."""
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
    axes.scatter(100 * table["victim_asr"], 100 * table["victim_acc"], c=GREY, s=12, label="victim")
    for place, name in enumerate(names):
        group = table[table["method_name"] == name]
        axes.scatter(
            100 * group["purified_asr"],
            100 * group["purified_acc"],
            s=18,
            label=name,
            **{k: v for k, v in style(place).items() if k != "linestyle"},
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
    plain_ticks(axes.xaxis)
    axes.tick_params(axis="y", labelsize=7)
    return figure


def hold(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """The table with cases and methods named and told apart by everything but ``column``."""
    kind, varied = VARIED[column]
    names = CASE[:3] if kind == "case" else ["defense", "selection"]
    first = table.drop_duplicates(kind).set_index(kind)
    rest = {
        own: {k: v for k, v in options.items() if k not in varied}
        for own, options in first[f"{kind}_options"].items()
    }
    same = {
        own: digest(list(named), rest[own]) if rest[own] else own  # not known: like no other
        for own, named in zip(first.index, first[names].to_numpy(), strict=True)
    }
    held = table.assign(
        **{f"{kind}_options": table[kind].map(rest), kind: table[kind].map(same)},
        budget="" if kind == "method" else table["budget"],
        granted=[
            bool(o.get("budget.poisoned") or o.get("budget.incoming"))
            for o in table["method_options"]
        ],
    )
    return labels(relabel(held)[0])


def over(table: pd.DataFrame, column: str) -> Figure | None:
    """ASR over ``column``, all else the same: a panel per case, a line per method; or None.

    Over clean images, methods that need none are points at 0. Dashed is the victim.
    """
    held = hold(table, column)
    panels = []
    for title, group in held.groupby("attacked"):
        varied = group.groupby("method_name")[column].transform("nunique") > 1
        if varied.any():
            free = (group[column] == 0) & ~group["granted"] & (column == "clean_images")
            panels.append((title, group, group[varied | free]))
    if not panels:
        return None
    names = sorted({name for _, _, shown in panels for name in shown["method_name"]})
    down, across = -(-len(panels) // ACROSS), min(ACROSS, len(panels))
    size = (4 * across + 1 + 0.07 * max(map(len, names)), max(3.4 * down, 1 + 0.16 * len(names)))
    figure = Figure(figsize=size, layout="constrained")
    near = 0.01 if column == "poison_rate" else 10  # the axis is linear up to here
    grid = figure.subplots(down, across, squeeze=False).ravel()
    for axes, (title, group, shown) in zip(grid, panels, strict=False):
        axes.set_xscale("symlog", linthresh=near)
        plain_ticks(axes.xaxis)
        for name, runs in shown.groupby("method_name"):
            line(axes, runs, column, "purified_asr", label=name, **style(names.index(name)))
        victims = group.drop_duplicates(["poison_rate", "seed"])
        dashed = {"label": "victim", "color": GREY, "linestyle": "--"}
        if column == "poison_rate":
            line(axes, victims, column, "victim_asr", **dashed)
        else:  # it knows nothing of the defender's images
            axes.axhline(100 * victims["victim_asr"].mean(), **dashed)
        axes.set_title(title, fontsize=8)
        axes.set(xlabel=column.replace("_", " "), ylabel="ASR (%)", ylim=(-2, 102))
        axes.set_xlim(-near / 2, 2 * group[column].max())
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    legend(figure)
    return figure


def line(axes: Axes, table: pd.DataFrame, x: str, y: str, **look: Any) -> None:
    """Means with 95 % intervals of the mean where there are several values."""
    runs = (100 * table.set_index(x)[y]).groupby(level=0)
    found, half = runs.mean(), runs.agg(half_width).fillna(0)
    axes.errorbar(found.index, found, yerr=half, capsize=2, **look)


def legend(figure: Figure) -> None:
    """One legend for all panels, each label once."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(list(found.values()), list(found), fontsize=7, loc="outside right upper")


def curves(table: pd.DataFrame) -> Figure | None:
    """Losses over epochs of the first seed of each case and method; None without any."""
    first = table.sort_values("seed").drop_duplicates(["case", "method"]).head(CURVES)
    found: dict[str, list[tuple[str, pd.DataFrame]]] = {}
    for row in first.to_dict("records"):
        file = Path(row["folder"]) / "curves.csv"
        try:
            if not file.exists() or file.stat().st_size < 4:
                continue
            rows = pd.read_csv(file)
            rows = rows[rows["stage"] == "defense"]
        except UNREADABLE as error:
            damage(file, error)
            continue
        for name in rows.columns.difference(["stage", "epoch"]):
            if rows[name].notna().any():
                found.setdefault(name, []).append(
                    (f"{row['method_name']}, {row['attacked']}", rows)
                )
    if not found:
        return None
    names = list(dict.fromkeys(label for runs in found.values() for label, _ in runs))
    size = (8 + 0.06 * max(map(len, names)), max(2.2 * len(found), 1 + 0.16 * len(names)))
    figure = Figure(figsize=size, layout="constrained")
    for axes, (name, runs) in zip(
        figure.subplots(len(found), 1, squeeze=False)[:, 0], sorted(found.items()), strict=True
    ):
        for label, rows in runs:
            kept = rows[rows[name].notna()]
            look = style(names.index(label)) | sparse(len(kept))
            axes.plot(kept["epoch"], kept[name], label=label, linewidth=0.8, **look)
        axes.set_title(name, fontsize=8)
    legend(figure)
    return figure
