"""``report.html``: one self-contained page about one run, made from its result folder."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import jinja2
import matplotlib

matplotlib.use("Agg")
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from dhbe.core.exit_status import UNWRITABLE
from dhbe.report import former
from dhbe.report.findings import findings
from dhbe.report.folder import LABELS, ROLES, reach_rows, read_metrics, rows, work
from dhbe.report.legend import METRICS, class_names
from dhbe.report.texts import decimals, drawing

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"
"""Colours that colour-blind readers tell apart (Okabe and Ito)."""
COLOURS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""All of theirs that stand out on white."""
MARKERS = "osv^Dpx*P<>X+d123"
STROKES = ("-", "--", "-.", ":")


def style(place: int) -> dict[str, Any]:
    """Colour, marker and stroke of the line at this place; the first 119 differ."""
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": STROKES[place % len(STROKES)],
    }


def sparse(points: int) -> dict[str, Any]:
    """A few small markers on a line of so many points."""
    return {"markevery": max(1, points // 8), "markersize": 4}


@drawing()
def write_page(folder: Path) -> Path:
    """Write ``report.html`` into a result folder."""
    metrics = former.metrics(read_metrics(folder))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dhbe.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["decimals"] = decimals
    pictures = sorted((folder / "pictures").glob("*.png"))
    config = (folder / "config.yaml").read_text()
    names = class_names(metrics["data"], config)
    page = environment.get_template("run.html").render(
        m=metrics,
        rows=rows(metrics),
        legend=METRICS | {label: METRICS[key] for key, label in LABELS.items()},
        names=names,
        findings=findings(metrics, names),
        work={stage: work(metrics, stage) for stage in ("victim", "defense")},
        examples=_examples(folder),
        generated=[_shown(p) for p in pictures if p.name.startswith(("generated", "imagined"))],
        patches=[_shown(p) for p in pictures if p.name.startswith("patches")],
        triggers=[_shown(p) for p in pictures if p.name.startswith("triggers_found")],
        curves=_curves(folder / "curves.csv"),
        **_evidence(metrics, pictures),
        config=config,
    )
    target = folder / "report.html"
    target.write_text(page, encoding="utf-8", errors=UNWRITABLE)
    return target


def data_url(blob: bytes, kind: str = "image/png") -> str:
    """Bytes as a URL that a page can hold."""
    return f"data:{kind};base64,{base64.b64encode(blob).decode()}"


def _png(pixels: np.ndarray) -> str:
    """Image (C, H, W) uint8 -> data URL."""
    image = pixels.transpose(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(buffer, "PNG")
    return data_url(buffer.getvalue())


def _shown(file: Path) -> dict[str, str]:
    epoch = file.stem.rpartition("_")[2].lstrip("0")
    caption = f"epoch {epoch}" if epoch.isdigit() else ""
    return {"url": data_url(file.read_bytes()), "caption": caption}


def _evidence(metrics: dict[str, Any], pictures: list[Path]) -> dict[str, Any]:
    """The section on a foreign checkpoint; empty for other runs."""
    found = metrics.get("evidence")
    if found is None:
        return {}
    changes = sorted(found["weights"].items(), key=lambda pair: -pair[1])
    return {
        "reach": reach_rows(found["reach"])[:20],
        "weights": changes[:20],
        "strongest": [
            _shown(p) | {"caption": p.stem.replace("_", " ")}
            for p in pictures
            if p.stem.startswith(("strongest", "impressions"))
        ],
    }


def _examples(folder: Path) -> list[dict[str, Any]]:
    """Test images with what both networks say, clean and triggered; empty without data."""
    if not (folder / "examples.npz").exists():
        return []
    found: dict[str, np.ndarray] = dict(np.load(folder / "examples.npz"))
    predictions: dict[str, np.ndarray] = dict(np.load(folder / "predictions.npz"))
    examples = []
    for i, position in enumerate(found["index"]):
        clean = found["clean"][i]
        example: dict[str, Any] = {"label": int(predictions["labels"][position]), "goal": None}
        example["clean"] = {"url": _png(clean)}
        for role in ROLES:
            example["clean"][role] = int(predictions[f"{role}_clean"][position])
        if "triggered" in found:
            triggered = found["triggered"][i]
            change = np.abs(triggered.astype(int) - clean.astype(int)).astype(np.uint8)
            example["triggered"] = {"url": _png(triggered)}
            for role in ROLES:
                example["triggered"][role] = int(predictions[f"{role}_triggered"][position])
            example["goal"] = int(predictions["goal"][position])
            example["difference"] = _png(change)
        examples.append(example)
    return examples


def _curves(file: Path) -> str | None:
    """Losses, and ACC/ASR, each where they were recorded, as one SVG data URL; None for neither."""
    try:
        table = pd.read_csv(file)
    except pd.errors.EmptyDataError:
        return None
    defense = table[table["stage"] == "defense"]
    if defense.empty:
        return None
    measured = [name for name in ("val/acc", "val/asr") if name in defense]
    losses = [
        c for c in map(str, defense) if "/" in c and not c.startswith("val/") and defense[c].any()
    ]
    panels = bool(measured) + bool(losses)
    if not panels:
        return None
    figure = Figure(figsize=(4.5 * panels, 3), layout="constrained")
    grid = [*figure.subplots(1, panels, squeeze=False).ravel()]
    if measured:
        axes = grid[0]
        for place, name in enumerate(measured):
            points = defense[["epoch", name]].dropna()
            axes.plot(points["epoch"] + 1, 100 * points[name], label=name, **style(place))
        axes.set(ylabel="%", ylim=(-2, 102), title="purified network, test images")
    for place, name in enumerate(losses):
        grid[-1].plot(
            defense["epoch"] + 1, defense[name], label=name, **style(place), **sparse(len(defense))
        )
        grid[-1].set(title="losses of the players")
    for axes in grid:
        axes.set(xlabel="epoch")
        axes.grid(color="#eeeeee")
        axes.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return data_url(buffer.getvalue(), "image/svg+xml")
