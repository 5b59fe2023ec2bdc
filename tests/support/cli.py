"""The command line, called as a user calls it or in this process."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from tests.conftest import ROOT
from tests.support.commands import called

TINY = (
    "data.limit=300",
    "data.train_size=7600",
    "model.widths=[16,24]",
    "victim.epochs=2",
    "trainer.threads=1",
    "trainer.observe_every=1",
)


GAME = (
    "defense.epochs=2",
    "defense.iterations=2",
    "defense.warm_up=1",
    "defense.batch_size=8",
    "defense.width=4",
    "defense.patch_width=4",
)


def run(
    folder: Path, *overrides: str, victims: str = "victims", **environment: str
) -> subprocess.CompletedProcess[str]:
    """``python run.py`` from another folder, as a child process."""
    return called(
        [
            str(ROOT / "run.py"),
            *overrides,
            f"paths.victims={folder}/{victims}",
            f"paths.results={folder}/results",
        ],
        cwd=folder,
        env=os.environ | environment,
    )


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())
