"""The parts and stages of one run: victim, defense, predictions, evidence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger

from dhbe.config import identity
from dhbe.core.types import Suspect
from dhbe.data import Splits, load
from dhbe.evaluation.caveats import caveats
from dhbe.evaluation.evaluator import Evaluator
from dhbe.evaluation.evidence import Evidence
from dhbe.evaluation.metrics import Predictions, summarize
from dhbe.experiment.assembly import Parts
from dhbe.experiment.clock import Clock
from dhbe.experiment.grant import grant
from dhbe.models import Normalized
from dhbe.training.recorder import Recorder, Stopwatch
from dhbe.training.runtime import Runtime
from dhbe.victim.source import VictimRequest
from dhbe.victim.store import Victim


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The parts of a run, its images, how it computes, and the clock of its stages.

    Attributes:
        config: resolved completely.
        choices: name of the chosen config in each group.
        evaluator: None without test images; then there are no predictions.
    """

    config: dict[str, Any]
    choices: Mapping[str, str]
    parts: Parts
    splits: Splits | None
    evaluator: Evaluator | None
    runtime: Runtime
    clock: Clock

    @classmethod
    def of(
        cls,
        config: dict[str, Any],
        parts: Parts,
        choices: Mapping[str, str],
        workdir: Path,
        logger: Logger | None,
    ) -> Setting:
        """Read the images; the evaluation may watch the trainings, and gives nothing back."""
        trainer, evaluator = parts.trainer, None
        splits = load(parts.data, identity.fingerprint(config["data"]))
        if splits is not None and len(splits.test):
            attack = parts.attack if parts.attack.active else None
            evaluator = Evaluator(splits.test, attack, device=trainer.device)
        watch = None if evaluator is None else evaluator.observer()
        runtime = Runtime(
            trainer_config=trainer,
            seed=config["seed"],
            workdir=workdir,
            recorder=Recorder(watch, trainer.observe_every),
            logger=logger,
            weights_only=parts.source.weights_only,
        )
        return cls(
            config=config,
            choices=choices,
            parts=parts,
            splits=splits,
            evaluator=evaluator,
            runtime=runtime,
            clock=Clock(trainer.device),
        )

    @property
    def request(self) -> VictimRequest:
        """Which victim is wanted."""
        return VictimRequest(
            config=self.config,
            spec=self.parts.spec,
            attack=self.parts.attack,
            splits=self.splits,
            runtime=self.runtime,
        )

    def victim(self) -> Victim:
        """The network under suspicion, on the device of the run."""
        with self.clock.stage("victim"):
            victim = self.parts.source.obtain(self.request)
        victim.network.to(self.runtime.device, self.runtime.dtype)
        return victim

    def purified(self, victim: Victim) -> Normalized:
        """Apply the defense to the suspect, with the data that its budget grants."""
        with self.clock.stage("defense"):
            watch = self.runtime.stopwatch = Stopwatch(self.runtime.workdir)
            suspect = Suspect(
                network=victim.network,
                architecture=self.choices["model"],
                spec=self.parts.spec,
            )
            data = grant(self.parts, self.splits, victim, self.runtime.seed, self.evaluator)
            limit = self.request.config["data"].get("limit")
            if limit and self.splits is not None and self.parts.budget.clean:
                self.runtime.recorder.notes.append(
                    f"data.limit={limit} cuts the training images, too: the defender has "
                    f"{len(data.clean())} clean ones"
                )
            purified = self.parts.defense(suspect, data, self.runtime)
        self.clock.seconds["defense"] += watch.earlier
        return purified

    def predictions(self, network: Normalized, sha256: str | None = None) -> Predictions | None:
        """Classes of the test images, if there are any.

        Args:
            sha256: of stored weights, which the next run of a sweep may share.
        """
        if self.evaluator is None:
            return None
        with self.clock.stage("evaluate"):
            if sha256 is None:
                return self.evaluator.predict(network)
            runtime = self.runtime
            rounding = (runtime.device, runtime.dtype, runtime.trainer_config.threads)
            return self.evaluator.predict_once(network, (sha256, *rounding))

    def caveats(self, before: Predictions | None) -> list[str]:
        """Caveats for the report: on the images, and on a victim that is a foreign checkpoint."""
        if self.parts.source.trains:
            notes = [] if self.splits is None else self.splits.notes
            return [*self.parts.source.assumed, *notes]
        return caveats(
            assumed=self.parts.source.assumed,
            splits=self.splits,
            attack=self.parts.attack,
            probe=self.parts.probe,
            before=before,
        )

    def evidence(self, victim: Victim, purified: Normalized) -> Evidence | None:
        """Evidence that needs no data, if requested."""
        if self.parts.probe is None:
            return None
        with self.clock.stage("evidence"):
            return self.parts.probe(victim.network, purified, self.runtime)

    def clean_baseline(self) -> dict[str, float | None] | None:
        """Rates of the clean network of the same recipe under the same trigger, if asked for."""
        wanted = self.config["clean_baseline"] and self.parts.attack.active
        if not wanted or self.evaluator is None:
            return None
        clean = self.parts.source.obtain(self.request.without_attack()).network
        found = self.evaluator.predict(clean.to(self.runtime.device, self.runtime.dtype))
        rates: dict[str, float | None] = summarize(found, found, self.evaluator.truth)["victim"]
        return rates
