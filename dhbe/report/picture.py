"""Overview pictures: ``overview.png`` of one run, and a gallery of attacks."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from dhbe.report.damaged import UNREADABLE, damage
from dhbe.report.folder import read_metrics
from dhbe.report.page import BLUE, ORANGE
from dhbe.report.texts import drawing

SHOWN = 6
"""Test images in the picture of a run."""
EACH = 5
"""Test images of each attack."""
MADE = {
    "generated": "generated images",
    "imagined": "imagined images",
    "patches": "patches",
    "triggers_found": "triggers found",
}
"""Pictures of a defense, by the stem of their files, and what they show."""
ACROSS, DOWN = 8, 3
"""Tiles in a row of such a picture, and rows that are shown."""


@drawing()
def write_overview(folder: Path) -> Path | None:
    """Write ``overview.png`` into a result folder; None if it has no triggered images.

    Left: triggered test images. Middle: the images and triggers that the defense made, if any; of
    several epochs the last. Right: ACC and ASR before and after.
    """
    examples = folder / "examples.npz"
    if not examples.exists() or "triggered" not in (found := dict(np.load(examples))):
        return None
    last = {name: sorted((folder / "pictures").glob(f"{name}*.png"))[-1:] for name in MADE}
    made = {MADE[name]: files[0] for name, files in last.items() if files}
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    widths = [1.5, *([1.6] * bool(made)), 1.5]
    panels: Any = figure.subfigures(1, len(widths), width_ratios=widths)
    _images(panels[0], found["clean"][:SHOWN], found["triggered"][:SHOWN])
    if made:
        _grids(panels[1], made)
    _bars(panels[-1], folder)
    target = folder / "overview.png"
    figure.savefig(target, dpi=110)
    return target


def _show(axes: Any, pixels: np.ndarray) -> None:
    axes.imshow(pixels, cmap="gray", interpolation="nearest")
    axes.set_axis_off()


def _images(panel: Any, clean: np.ndarray, triggered: np.ndarray) -> None:
    panel.suptitle("test images, clean and triggered")
    half = len(clean) // 2
    rows = (clean[:half], triggered[:half], clean[half : 2 * half], triggered[half : 2 * half])
    framed = np.pad(np.stack(rows), [(0, 0)] * 3 + [(0, 2)] * 2, constant_values=255)
    # (rows, images, C, H, W) -> one picture: an axes for each image would take a tenth of a second
    whole = framed.transpose(0, 3, 1, 4, 2).reshape(4 * framed.shape[3], half * framed.shape[4], -1)
    _show(panel.subplots(), whole.squeeze())


def _grids(panel: Any, files: dict[str, Path]) -> None:
    panel.suptitle(", ".join(files))
    for a, file in zip(
        panel.subplots(len(files), 1, squeeze=False)[:, 0], files.values(), strict=True
    ):
        pixels = np.asarray(Image.open(file))
        _show(a, pixels[: pixels.shape[1] // ACROSS * DOWN])  # the upper rows of a high grid


def _bars(panel: Any, folder: Path) -> None:
    metrics = read_metrics(folder)
    axes = panel.subplots()
    for offset, name, colour in ((0, "acc", BLUE), (1, "asr", ORANGE)):
        values = [100 * (metrics[r][name] or 0) for r in ("victim", "purified")]
        at = [offset * 0.4 + i for i in range(2)]
        bars = axes.bar(at, values, 0.38, color=colour, label=name.upper())
        axes.bar_label(bars, fmt="%.1f %%")
    axes.set_xticks([0.2, 1.2], ["victim", f"after {metrics['defense']}"])
    axes.set_ylim(0, 115)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_yticks([])
    axes.legend(frameon=False, ncols=2, loc="upper right")


def gallery(table: pd.DataFrame) -> Figure | None:
    """A row per data set and attack: clean test images, the same triggered; None without any."""
    strips: dict[str, np.ndarray] = {}
    attacked = table[table["attack"] != "none"]
    for data, attack, folder in attacked[["data", "attack", "folder"]].to_numpy():
        file = Path(folder) / "examples.npz"
        if f"{attack}\n{data}" not in strips and file.exists():
            try:
                found = dict(np.load(file))
                if "triggered" in found:
                    strips[f"{attack}\n{data}"] = _strip(found["clean"], found["triggered"])
            except (*UNREADABLE, BadZipFile, zlib.error) as error:
                damage(file, error)
    if not strips:
        return None
    room = 0.2 + 0.065 * max(len(line) for name in strips for line in name.split("\n"))  # inches
    width, height = room + 1.4 * EACH, 0.3 + 0.75 * len(strips)
    figure = Figure(figsize=(width, height))
    edges = {"left": room / width, "right": 1, "bottom": 0.03 / height, "top": 1 - 0.27 / height}
    rows = figure.subplots(len(strips), 1, squeeze=False, gridspec_kw=edges | {"hspace": 0.05})[
        :, 0
    ]
    for axes, (name, pixels) in zip(rows, sorted(strips.items()), strict=True):
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_axis_off()
        beside = {"transform": axes.transAxes, "fontsize": 7}
        axes.text(-0.01, 0.5, name, ha="right", va="center", **beside)
    for start, title in ((0, "clean"), (0.5, "triggered")):
        rows[0].text(start, 1.05, title, fontsize=8, transform=rows[0].transAxes)
    return figure


def _strip(clean: np.ndarray, triggered: np.ndarray) -> np.ndarray:
    """Images (N, C, H, W) uint8 -> one picture (H, W', C), or (H, W') of grey ones."""
    shown = np.concatenate([clean[:EACH], triggered[:EACH]])
    gap = max(1, shown.shape[3] // 16)
    framed = np.pad(shown, [(0, 0)] * 3 + [(0, gap)], constant_values=255)
    whole: np.ndarray = framed.transpose(2, 0, 3, 1).reshape(shown.shape[2], -1, shown.shape[1])
    return whole.squeeze(axis=2) if whole.shape[2] == 1 else whole
