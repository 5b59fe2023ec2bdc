"""A victim of this project in every file that others write, purified by one command each.

    python run.py defense=none            # its purified.safetensors is the victim
    python run.py defense=clp             # the reference
    python -m benchmarks.formats outputs/results/.../purified.safetensors defense=clp

prints the first table of ``docs/results/purify.md``. The tests use the same writers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from dhbe.api import composed
from dhbe.checkpoint import CheckpointFile
from dhbe.config.schema import build
from dhbe.data import Data
from dhbe.victim.source import build_network
from tests.support.writers import save_all

RUN = Path(__file__).parent.parent / "run.py"
VICTIM = ("model=resnet_tiny", "data=cifar10_mini", "attack=badnets")


def main() -> None:
    """Print one row per format."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("victim", type=Path, help="purified.safetensors of defense=none")
    parser.add_argument("overrides", nargs="*", default=["defense=clp"])
    parser.add_argument("--only", help="a part of the descriptions to try")
    options = parser.parse_intermixed_args()
    warnings.simplefilter("ignore")
    tree = composed(VICTIM)
    data: Data = build(tree["data"])
    network = build_network(tree, data.spec, 0)
    CheckpointFile(path=str(options.victim)).load_into(network)
    print("| file | ACC before | ASR before | ACC after | ASR after |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        sizes = {"classes": data.spec.classes, "image_size": data.spec.image_size}
        plain = network.network.eval().to(memory_format=torch.contiguous_format)
        files = save_all(plain, Path(name), **sizes)
        for i, (description, file) in enumerate(files.items()):
            if options.only and options.only not in description:
                continue
            out = Path(name) / f"out{i}"
            task = ["task=purify", f"checkpoint={file}", *VICTIM, *options.overrides]
            command = [sys.executable, str(RUN), *task, f"hydra.run.dir={out}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"| {description} | {done.stderr.strip()} |", flush=True)
                continue
            found = json.loads((out / "metrics.json").read_text())
            rates = [found[role][k] for role in ("victim", "purified") for k in ("acc", "asr")]
            shown = " | ".join(f"{100 * rate:.2f} %" for rate in rates)
            print(f"| {description} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
