"""Seconds and memory of the report over many result folders: ``python -m benchmarks.report_size``.

Makes synthetic folders (10 attacks, 20 defenses, seeds) with the config of a real run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml
from hydra import compose, initialize
from omegaconf import OmegaConf

from dhbe.config.resolvers import register_resolvers


def write_cells(root: Path, count: int) -> None:
    """``count`` folders with metrics.json and config.yaml."""
    register_resolvers()
    with initialize(version_base="1.3", config_path="../conf"):
        config = OmegaConf.to_container(compose("config"), resolve=True)
    rng = np.random.default_rng(0)
    grid = itertools.product(range(count // 200), range(10), range(20))
    for number, (seed, attack, defense) in enumerate(grid):
        acc, asr = rng.uniform(0.7, 0.9), rng.uniform(0, 1) ** (1 + defense / 4)
        before = {"acc": 0.9, "asr": 1.0, "asr_conditional": 1.0, "ra": 0.0}
        metrics = {
            "victim": before,
            "purified": before | {"acc": acc, "asr": asr},
            "der": (1 - asr - (0.9 - acc) + 1) / 2,
            "data": "cifar10",
            "model": "resnet18",
            "attack": f"attack{attack}",
            "defense": f"defense{defense}",
            "budget": "pct5",
            "selection": "fixed",
            "seed": seed,
            "poison_rate": 0.1,
            "seconds": {"victim": 1.0, "defense": rng.exponential(10), "evaluate": 1.0},
            "commit": None,
        }
        folder = root / f"{number:016x}"
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(metrics))
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        write_cells(Path(scratch) / "cells", options.count)
        start = time.perf_counter()
        command = [sys.executable, "-m", "dhbe.report", f"{scratch}/cells", "--out", f"{scratch}/r"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        size = (Path(scratch) / "r" / "index.html").stat().st_size / 2**20
    print(f"{options.count} folders: {seconds:.1f} s, {peak:.2f} GiB, page {size:.1f} MiB")


if __name__ == "__main__":
    main()
