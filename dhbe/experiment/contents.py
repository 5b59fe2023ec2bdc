"""Contents of a result folder: weights, config, predictions, curves, pictures, metrics, pages."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from PIL import Image
from safetensors.torch import save_file

from dhbe.checkpoint.loading import UNWRITTEN
from dhbe.checkpoint.writing import untold
from dhbe.core.durable import writing
from dhbe.core.errors import ArtefactError
from dhbe.experiment.folder import CELL, METRICS
from dhbe.experiment.outcome import Outcome
from dhbe.experiment.summary import dump
from dhbe.models import Normalized
from dhbe.report.page import write_page
from dhbe.report.picture import write_overview
from dhbe.victim.source import VictimSource

EXAMPLES = 8
"""Test images shown in the report."""


def save_weights(
    folder: Path, tree: dict[str, Any], source: VictimSource | None, purified: Normalized
) -> None:
    """``purified.safetensors``, with what shapes do not tell, and a file like the one given.

    Args:
        source: of the victim; None writes no file like the one given.

    Raises:
        ArtefactError: see ``VictimSource.write_back``; says where the weights are.
    """
    weights = {k: v.cpu().contiguous() for k, v in purified.state_dict().items()}
    about = untold(tree)
    if purified.unwritten:
        about[UNWRITTEN] = purified.unwritten
    kept = folder / "purified.safetensors"
    with writing(kept):
        save_file(weights, kept, metadata=about)
    try:
        if source is not None:
            source.write_back(purified, folder)
    except ArtefactError as error:
        raise ArtefactError(f"{error} (the purified weights are in {kept})") from error


def write(folder: Path, outcome: Outcome, metrics: dict[str, Any]) -> None:
    """Everything but the weights; the pages last, because they read the folder."""
    (folder / "config.yaml").write_text(yaml.safe_dump(outcome.setting.config, sort_keys=False))
    write_predictions(folder, outcome)
    recorder = outcome.setting.runtime.recorder
    rows = [{"stage": "victim", **r} for r in outcome.victim.curves]
    rows += [{"stage": "defense", **r} for r in recorder.rows]
    pd.DataFrame(rows).to_csv(folder / "curves.csv", index=False)
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    for name, images in outcome.evidence.pictures.items() if outcome.evidence else ():
        recorder.picture(name, images)
    for name, pixels in recorder.pictures.items():
        save_grid(pixels, pictures / f"{name}.png")
    shutil.rmtree(folder / "training", ignore_errors=True)
    (folder / CELL).unlink()
    (folder / METRICS).write_text(dump(metrics))
    write_page(folder)
    write_overview(folder)


def write_predictions(folder: Path, outcome: Outcome) -> None:
    """``predictions.npz``, from which every rate can be counted again, and some examples."""
    arrays: dict[str, Any] = {}
    if outcome.setting.evaluator is not None:
        arrays |= vars(outcome.setting.evaluator.truth)
        for role, found in (("victim", outcome.before), ("purified", outcome.after)):
            assert found is not None
            arrays |= {f"{role}_{k}": v for k, v in vars(found).items() if v is not None}
        clean, triggered, index = outcome.setting.evaluator.examples(EXAMPLES)
        examples: dict[str, Any] = {"clean": clean, "index": index}
        if triggered is not None:
            examples["triggered"] = triggered
        np.savez_compressed(folder / "examples.npz", **examples)
    np.savez_compressed(folder / "predictions.npz", **arrays)


def save_grid(images: np.ndarray, file: Path, *, columns: int = 8, scale: int = 2) -> None:
    """PNG of images (N, C, H, W) uint8 side by side with a white pixel between them."""
    n, c, h, w = images.shape
    rows = -(-n // columns)
    grid = np.full((rows * (h + 1), min(n, columns) * (w + 1), 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (h + 1), i % columns * (w + 1)
        pixels = image.transpose(1, 2, 0) if c != 2 else image[[0, 1, 1]].transpose(1, 2, 0)
        grid[top : top + h, left : left + w] = np.repeat(pixels, 3, 2) if c == 1 else pixels
    big = Image.fromarray(grid)
    big.resize((big.width * scale, big.height * scale), Image.Resampling.NEAREST).save(file)
