"""Framework seconds per cell of a sweep: ``python -m benchmarks.sweep_overhead [--cells 200]``.

Trivial cells under joblib: one tiny victim of one epoch, an untouched network. What a cell takes
beyond its own work (``seconds`` in ``metrics.json``) is the framework's: composing, locks, files,
pages. The start of the workers (importing torch) is reported apart; it does not grow with the cells.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.clusters import ROOT
from dhbe.results import commit


def sweep(folder: Path, cells: int, workers: int) -> float:
    """Wall seconds of a sweep of ``cells`` cells that share one victim."""
    changes = ",".join(str(1 + i / 1000) for i in range(cells))
    command = [sys.executable, "run.py", "-m", "hydra/launcher=joblib", "defense=clp"]
    command += [f"hydra.launcher.n_jobs={workers}", f"defense.u={changes}", "trainer.threads=1"]
    command += ["data.limit=100", "data.train_size=7600", "victim.epochs=1"]
    command += [f"paths.victims={folder}/victims", f"paths.results={folder}/results"]
    start = time.perf_counter()
    quiet = subprocess.DEVNULL
    subprocess.run(command, cwd=ROOT, check=True, stdout=quiet, stderr=quiet)
    return time.perf_counter() - start


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sweep_overhead", description=__doc__
    )
    parser.add_argument("--cells", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start_up = sweep(folder / "few", options.workers, options.workers)
        wall = sweep(folder / "many", options.cells, options.workers)
        files = list((folder / "many" / "results").glob("*/metrics.json"))
        assert len(files) == options.cells
        work = sum(
            json.loads(f.read_text())["seconds"][k] for f in files for k in ("defense", "evaluate")
        )
        again = sweep(folder / "many", options.cells, options.workers)
    per_cell = ((wall - start_up) * options.workers - work) / options.cells
    print(f"commit {commit()}, {os.cpu_count()} cores, {options.workers} workers")
    print(f"start {start_up:.1f} s; {options.cells} cells {wall:.1f} s, of it work {work:.1f} s")
    print(f"framework: {per_cell:.3f} s of a worker per cell")
    print(f"all cells already there: {again:.1f} s, {(again) / options.cells:.3f} s per cell")


if __name__ == "__main__":
    main()
