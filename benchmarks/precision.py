"""What a precision does to a defense: ``python -m benchmarks.precision cpu_badnets``.

Each seed's victim is trained once, or read, in the trainer's own precision; then the defense runs
on that same network in each of the precisions, from the same draws.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.flops import config
from benchmarks.machine import DEVICE, about, now
from dhbe.config.identity import fingerprint
from dhbe.core.types import Suspect
from dhbe.data import load
from dhbe.evaluation.evaluator import Evaluator
from dhbe.evaluation.metrics import rates
from dhbe.experiment.assembly import assemble
from dhbe.experiment.grant import grant
from dhbe.training.runtime import Runtime
from dhbe.victim.source import VictimRequest


def measure(precisions: list[str], overrides: list[str]) -> None:
    """Print ACC, ASR and seconds of the defense in each precision, for one victim."""
    tree = config(*overrides)
    parts = assemble(tree)
    parts.trainer.apply()
    splits = load(parts.data, fingerprint(tree["data"]))
    evaluator = Evaluator(splits.test, parts.attack, device=DEVICE)

    def runtime(trainer, folder: str) -> Runtime:
        return Runtime(trainer_config=trainer, seed=tree["seed"], workdir=Path(folder) / "work")

    with TemporaryDirectory() as folder:
        own = runtime(parts.trainer, folder)
        request = VictimRequest(
            config=tree, spec=parts.spec, attack=parts.attack, splits=splits, runtime=own
        )
        victim = parts.source.obtain(request)
    suspect = Suspect(network=victim.network.to(DEVICE), architecture="", spec=parts.spec)
    for precision in precisions:
        trainer = assemble(config(*overrides, f"trainer.precision={precision}")).trainer
        data = grant(parts, splits, victim, tree["seed"], evaluator)
        with TemporaryDirectory() as folder:
            start = now()
            purified = parts.defense(suspect, data, runtime(trainer, folder))
            seconds = now() - start
        found = rates(evaluator.predict(purified), evaluator.truth)
        said = ", ".join(f"{k.upper()} {100 * (found[k].value or 0):.1f} %" for k in ("acc", "asr"))
        print(f"seed {tree['seed']}, {precision}: {said}, {seconds:.0f} s", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experiment", help="of conf/experiment: the victims")
    parser.add_argument("--defense", default="dhbe")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--precisions", nargs="+", default=["32-true", "bf16-mixed"])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    print(about())
    chosen = [f"experiment={options.experiment}", f"defense={options.defense}", *options.set]
    for seed in options.seeds:
        measure(options.precisions, [*chosen, f"seed={seed}"])


if __name__ == "__main__":
    main()
