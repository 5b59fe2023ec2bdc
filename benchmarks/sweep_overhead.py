"""Framework seconds per cell of a sweep: ``python -m benchmarks.sweep_overhead [--cells 200]``.

Trivial cells under joblib: CLP on one tiny victim of one epoch, 100 test images. What is left after
taking off the start of the workers (importing torch) is an upper bound of what the framework
costs: composing, locks, files, pages. On a machine that others use, trust the CPU seconds.
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
from dhbe.core.provenance import commit


def sweep(folder: Path, cells: int, workers: int) -> tuple[float, float]:
    """Wall and CPU seconds of a sweep of ``cells`` cells that share one victim."""
    changes = ",".join(str(1 + i / 1000) for i in range(cells))
    command = [sys.executable, "run.py", "-m", "hydra/launcher=joblib", "defense=clp"]
    command += [f"hydra.launcher.n_jobs={workers}", f"defense.u={changes}", "trainer.threads=1"]
    command += ["data.limit=100", "data.train_size=7600", "victim.epochs=1"]
    command += [f"paths.victims={folder}/victims", f"paths.results={folder}/results"]
    before, start = os.times(), time.perf_counter()
    quiet = subprocess.DEVNULL
    subprocess.run(command, cwd=ROOT, check=True, stdout=quiet, stderr=quiet)
    used = os.times()
    cpu = used.children_user + used.children_system - before.children_user - before.children_system
    return time.perf_counter() - start, cpu


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sweep_overhead", description=__doc__
    )
    parser.add_argument("--cells", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    print(f"commit {commit()}, {os.cpu_count()} cores, {options.workers} workers")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        few = sweep(folder / "few", options.workers, options.workers)
        many = sweep(folder / "many", options.cells, options.workers)
        files = list((folder / "many" / "results").glob("*/metrics.json"))
        assert len(files) == options.cells
        more = options.cells - options.workers
        for what, a, b in zip(("wall", "CPU"), few, many, strict=True):
            print(
                f"{what}: {options.workers} cells {a:.1f} s, {options.cells} cells {b:.1f} s: "
                f"{(b - a) / more:.3f} s per further cell",
                flush=True,
            )
        stages = [json.loads(f.read_text())["seconds"] for f in files]
        work = sum(s["defense"] + s["evaluate"] for s in stages) / len(stages)
        print(f"of it defense and evaluation {work:.3f} s by the clock")
        wall, cpu = sweep(folder / "many", options.cells, options.workers)
        print(f"all {options.cells} cells already there: {wall:.1f} s, CPU {cpu:.1f} s")


if __name__ == "__main__":
    main()
