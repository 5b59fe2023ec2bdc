"""``overview.png``: a run in one picture, for people who would rather look than read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from dhbe.report.folder import read_metrics
from dhbe.report.page import BLUE, ORANGE

SHOWN = 6
"""Test images in the picture."""


def write_overview(folder: Path) -> Path | None:
    """Write ``overview.png`` into a result folder; None if it has no triggered images.

    Left: triggered test images. Middle: what the generators made last, if the defense has any.
    Right: ACC and ASR before and after.
    """
    examples = folder / "examples.npz"
    if not examples.exists() or "triggered" not in (found := dict(np.load(examples))):
        return None
    last = [sorted((folder / "pictures").glob(f"{n}_*.png"))[-1:] for n in ("generated", "patches")]
    made = [files[0] for files in last if files]
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


def _grids(panel: Any, files: list[Path]) -> None:
    panel.suptitle("what the game invents: images, patches")
    for a, file in zip(panel.subplots(len(files), 1, squeeze=False)[:, 0], files, strict=True):
        _show(a, np.asarray(Image.open(file)))


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
