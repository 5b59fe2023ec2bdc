"""What launchers and their callbacks are given, and what they leave."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from hydra.types import RunMode
from omegaconf import OmegaConf

from dhbe.config.identity import cell_name

CELL = cell_name({"seed": 0})
"""Of each job here."""


def job(folder: Path, mode: RunMode = RunMode.MULTIRUN) -> Any:
    """What Hydra tells callbacks of a job with this result folder."""
    hydra = {
        "mode": mode,
        "runtime": {"output_dir": str(folder), "choices": {}, "cwd": "/"},
        "job": {"chdir": False},
        "sweep": {"dir": str(folder.parent)},
        "overrides": {"task": ["seed=0"]},
    }
    return OmegaConf.create({"hydra": hydra, "seed": 0})


def continued(folder: Path) -> bool:
    """Whether no epoch of the victim was trained twice; ``log.csv`` has all attempts' rows."""
    (log,) = (folder / "results").glob("[0-9a-f]*/log.csv")
    with log.open(newline="") as rows:
        steps = [int(row["step"]) for row in csv.DictReader(rows) if row["victim/loss"]]
    return len(steps) > 1 and steps == sorted(set(steps))
