"""A sweep killed at random moments: ``python -m benchmarks.kill_test [--kills 10] [--seed 0]``.

The process of a sweep, and whatever it started, gets SIGKILL at random moments and is started again
each time. In the end every cell must be there once and complete, its numbers those of a sweep that
nobody disturbed, and nothing else may lie around. Exit status 1 if not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from benchmarks.clusters import ROOT, numbers
from dhbe.core.provenance import commit

CELLS = [
    *("trainer.threads=1", "trainer.observe_every=1", "victim.epochs=4", "attack=badnets,blend"),
    *("seed=0,1", "defense=dfad,dhbe", "data.limit=2000", "data.train_size=7600"),
    *("defense.epochs=4", "defense.iterations=2", "defense.batch_size=32"),
]
"""Eight cells; two share each victim."""


def start(folder: Path, cells: list[str]) -> subprocess.Popen[bytes]:
    """The sweep, in a process group of its own."""
    command = [sys.executable, "run.py", "-m", *cells]
    command += [f"paths.victims={folder}/victims", f"paths.results={folder}/results"]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=ROOT, stdout=quiet, stderr=quiet, start_new_session=True)


def finished(folder: Path) -> dict[str, int]:
    """When each finished cell's metrics were written (nanoseconds)."""
    return {
        f.parent.name: f.stat().st_mtime_ns
        for f in (folder / "results").glob("[0-9a-f]*/metrics.json")
    }


def leftovers(folder: Path) -> list[str]:
    """What a clean sweep does not leave: temporary files, half folders, unreadable results."""
    wrong = [str(p) for p in folder.rglob(".*.partial")] + [str(p) for p in folder.rglob("*.tmp")]
    wrong += [str(p) for p in folder.rglob("*.new")] + [str(p) for p in folder.rglob(".*.failed.*")]
    for cell in (folder / "results").glob("[0-9a-f]*"):
        try:
            json.loads((cell / "metrics.json").read_text())
            load_file(cell / "purified.safetensors")
            np.load(cell / "predictions.npz")["labels"]
            assert (cell / "report.html").stat().st_size > 1000
        except Exception as error:  # whatever is wrong with it is what we are here to find
            wrong.append(f"{cell}: {error!r}")
    return wrong


def disturbed(folder: Path, cells: list[str], kills: int, span: float, rng: random.Random) -> Any:
    """Kill and restart, then let the sweep end; returns (problems, seconds until each kill)."""
    seen: dict[str, int] = {}
    problems, moments = [], []
    for round_ in range(kills + 1):
        process = start(folder, cells)
        moment = rng.uniform(0.2, 1.0) * span
        begun = time.perf_counter()
        try:
            process.wait(None if round_ == kills else moment)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            moments.append(time.perf_counter() - begun)
        now = finished(folder)
        problems += [f"{c} was computed again" for c, when in seen.items() if now.get(c) != when]
        seen = now
    if process.returncode:
        problems.append(f"the last sweep ended with {process.returncode}")
    return problems, moments


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kill_test", description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--span", type=float, default=0, help="longest life in s; 0: from a trial")
    parser.add_argument("--cells", nargs="+", default=CELLS, help="overrides of another sweep")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as calm, tempfile.TemporaryDirectory() as wild:
        begun = time.perf_counter()
        start(Path(calm), options.cells).wait()
        seconds = time.perf_counter() - begun
        span = options.span or max(15.0, 3 * seconds / options.kills)
        rng = random.Random(options.seed)
        problems, moments = disturbed(Path(wild), options.cells, options.kills, span, rng)
        expected, found = numbers(Path(calm)), numbers(Path(wild))
        problems += [f"{c}: numbers differ" for c in expected if found.get(c) != expected[c]]
        problems += [f"{c}: not a cell" for c in found.keys() - expected.keys()]
        problems += leftovers(Path(wild))
    print(f"commit {commit()}, {os.cpu_count()} cores; undisturbed {seconds:.0f} s")
    print(f"killed after {', '.join(f'{m:.1f}' for m in moments)} s")
    print(f"{len(found)} of {len(expected)} cells; problems: {problems or 'none'}")
    sys.exit(1 if problems or not expected else 0)


if __name__ == "__main__":
    main()
