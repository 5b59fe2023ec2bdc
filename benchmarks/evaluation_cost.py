"""What evaluation inside the loop costs: ``python -m benchmarks.evaluation_cost``.

Our RNP and fine-tuning evaluate once, at the end. The official codes test all clean and triggered
test images after every epoch and after every threshold. Both ways run in turns in one process, on
the embedded data, on a victim that is trained first if it is not stored; medians are compared.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from benchmarks.flops import config
from benchmarks.machine import DEVICE, about, medians
from dhbe.config.identity import fingerprint
from dhbe.core.types import Suspect
from dhbe.data import load
from dhbe.evaluation.evaluator import Evaluator
from dhbe.experiment.assembly import assemble
from dhbe.experiment.grant import grant
from dhbe.training.runtime import Runtime
from dhbe.victim.source import VictimRequest


class EveryEpoch(Callback):
    """Tests everything after each epoch."""

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.evaluator.predict(pl_module.network.eval())


@dataclass(kw_only=True)
class Watched(Runtime):
    """A runtime that evaluates all the time."""

    evaluator: Evaluator

    def fit(self, module, batches, *, callbacks: Sequence[Callback] = (), **options) -> None:
        """Train and test in turns."""
        watch = EveryEpoch(self.evaluator)
        super().fit(module, batches, callbacks=[*callbacks, watch], **options)


def measure(defense: str, rounds: int, overrides: list[str]) -> None:
    """Print the seconds of both ways and their ratio."""
    tree = config("victim=quick", f"defense={defense}", "trainer.observe_every=0", *overrides)
    parts = assemble(tree)
    splits = load(parts.data, fingerprint(tree["data"]))
    evaluator = Evaluator(splits.test, parts.attack, device=DEVICE)
    with TemporaryDirectory() as folder:
        common: dict[str, Any] = {"trainer_config": parts.trainer, "seed": tree["seed"]}
        first = Runtime(**common, workdir=Path(folder) / "victim")
        request = VictimRequest(
            config=tree, spec=parts.spec, attack=parts.attack, splits=splits, runtime=first
        )
        victim = parts.source.obtain(request)
    victim.network.to(DEVICE)
    suspect = Suspect(network=victim.network, architecture="", spec=parts.spec)
    chosen = parts.defense.selection

    def run(kind: type[Runtime], selection: Any, **more: Any) -> None:
        parts.defense.selection = selection
        data = grant(parts, splits, victim, tree["seed"], evaluator)
        with TemporaryDirectory() as folder:
            runtime = kind(**common, workdir=Path(folder) / "work", **more)
            purified = parts.defense(suspect, data, runtime)
            evaluator.predict(purified)

    # Who chooses by the test set looks at (the first 1,000 images of) it for each threshold.
    oracle = "oracle" if chosen == "validation" else chosen
    calls = {
        "once": lambda: run(Runtime, chosen),
        "always": lambda: run(Watched, oracle, evaluator=evaluator),
    }
    found = medians(calls, rounds)
    print(
        f"{defense:12} evaluated once {found['once']:.2f} s, always {found['always']:.2f} s, "
        f"ratio {found['always'] / found['once']:.2f} (medians of {rounds})",
        flush=True,
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--defenses", nargs="+", default=["finetune", "rnp"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    print(about())
    for defense in options.defenses:
        measure(defense, options.rounds, options.set)


if __name__ == "__main__":
    main()
