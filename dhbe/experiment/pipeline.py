"""One run: config, data, attack, victim, suspect, defense, evaluation, result folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from pytorch_lightning.loggers import Logger

from dhbe.config import identity
from dhbe.config.resolution import resolved
from dhbe.config.schema import plain
from dhbe.core.types import Suspect
from dhbe.data import Splits, load
from dhbe.evaluation.caveats import caveats
from dhbe.evaluation.evaluator import Evaluator
from dhbe.evaluation.evidence import Evidence
from dhbe.evaluation.metrics import Predictions, summarize
from dhbe.experiment.assembly import Parts, assemble
from dhbe.experiment.clock import Clock
from dhbe.experiment.contents import save_weights, write
from dhbe.experiment.folder import ResultFolder
from dhbe.experiment.grant import grant
from dhbe.experiment.outcome import Outcome
from dhbe.experiment.summary import metrics as metrics_of
from dhbe.experiment.tracking import report, tracked
from dhbe.models import Normalized
from dhbe.report.console import show
from dhbe.training import parallel as processes
from dhbe.training.recorder import Recorder, Stopwatch
from dhbe.training.runtime import Runtime
from dhbe.victim.source import VictimRequest
from dhbe.victim.store import Victim


def run(cfg: DictConfig, folder: Path, choices: Mapping[str, str]) -> dict[str, Any]:
    """Carry out one run and return its metrics; a finished folder of the same config is reused.

    Args:
        folder: where the result goes.
        choices: name of the chosen config in each group, for tables.
    """
    result = ResultFolder(folder)
    try:
        tree, choices = resolved(plain(cfg), choices)
        parts = assemble(tree)
        parts.source.check_folder(folder)
        count = parts.trainer.processes
        processes.refuse_multirun(count)
        if result.complete and not tree["force"] and not processes.started():
            return reuse(result, tree)
        if count > 1 and not processes.started():
            processes.launch(count)
            return result.metrics(identity.cell(tree))
        with processes.group(count, parts.trainer.device), result.claimed():
            if processes.agree(result.complete and not tree["force"]):
                return reuse(result, tree)
            with tracked(tree, choices, result.partial) as logger:
                metrics, _ = compute(tree, parts, result, choices, logger)
            if processes.first():
                show(metrics, result.path)
            return metrics
    finally:
        result.discard_empty()


def reuse(result: ResultFolder, tree: dict[str, Any]) -> dict[str, Any]:
    """The metrics of a finished folder.

    Raises:
        ConfigError: the folder holds the result of another config.
    """
    metrics = result.metrics(identity.cell(tree))
    show(metrics, result.path, reused=True)
    return metrics


def compute(
    tree: dict[str, Any],
    parts: Parts,
    result: ResultFolder,
    choices: Mapping[str, str],
    logger: Logger | None,
) -> tuple[dict[str, Any], Normalized]:
    """The run itself, into ``result``: its metrics and the purified network."""
    parts.trainer.apply()
    cell, clock = identity.cell(tree), Clock(parts.trainer.device)
    splits = load(parts.data, identity.fingerprint(tree["data"]))
    evaluator = evaluator_of(parts, splits)
    runtime = runtime_of(tree, parts, evaluator, result.open(cell) / "training", logger)
    request = VictimRequest(
        config=tree, spec=parts.spec, attack=parts.attack, splits=splits, runtime=runtime
    )
    with clock.stage("victim"):
        victim = parts.source.obtain(request)
    victim.network.to(runtime.device, runtime.dtype)
    before = measured(evaluator, victim.network, clock, runtime, sha256=victim.sha256)
    with clock.stage("defense"):
        runtime.stopwatch = Stopwatch(runtime.workdir)
        suspect = Suspect(network=victim.network, architecture=choices["model"], spec=parts.spec)
        data = grant(parts, splits, victim, runtime.seed, evaluator)
        purified = parts.defense(suspect, data, runtime)
    clock.seconds["defense"] += runtime.stopwatch.earlier
    if processes.first():  # before anything else can go wrong
        save_weights(result.open(cell), tree, parts.source, purified)
    after = measured(evaluator, purified, clock, runtime)
    runtime.recorder.notes += notes(parts, splits, before)
    outcome = Outcome(
        config=tree,
        choices=choices,
        parts=parts,
        runtime=runtime,
        clock=clock,
        victim=victim,
        purified=purified,
        evaluator=evaluator,
        before=before,
        after=after,
        evidence=probed(parts, victim, purified, clock, runtime),
        clean_baseline=clean_baseline(request, parts, evaluator),
    )
    metrics = metrics_of(outcome)
    if processes.first():
        report(logger, metrics, runtime.recorder.pictures)
        write(result.open(cell), outcome, metrics)  # again: somebody may have deleted it
        result.publish()
    return metrics, purified


def evaluator_of(parts: Parts, splits: Splits | None) -> Evaluator | None:
    """What measures networks on the test images, if there are any."""
    if splits is None or not len(splits.test):
        return None
    attack = parts.attack if parts.attack.active else None
    return Evaluator(splits.test, attack, device=parts.trainer.device)


def runtime_of(
    tree: dict[str, Any],
    parts: Parts,
    evaluator: Evaluator | None,
    workdir: Path,
    logger: Logger | None,
) -> Runtime:
    """How this run computes; the evaluation may watch, and gives nothing back."""
    watch = None if evaluator is None else evaluator.observer()
    return Runtime(
        trainer_config=parts.trainer,
        seed=tree["seed"],
        workdir=workdir,
        recorder=Recorder(watch, parts.trainer.observe_every),
        logger=logger,
        weights_only=parts.source.weights_only,
    )


def measured(
    evaluator: Evaluator | None,
    network: Normalized,
    clock: Clock,
    runtime: Runtime,
    *,
    sha256: str | None = None,
) -> Predictions | None:
    """Predictions of a network for the test images, if there are any.

    Args:
        sha256: of stored weights, which the next run of a sweep may share.
    """
    if evaluator is None:
        return None
    with clock.stage("evaluate"):
        if sha256 is None:
            return evaluator.predict(network)
        rounding = (runtime.device, runtime.dtype, runtime.trainer_config.threads)
        return evaluator.predict_once(network, (sha256, *rounding))


def notes(parts: Parts, splits: Splits | None, before: Predictions | None) -> list[str]:
    """Caveats, where the victim is somebody else's."""
    if parts.source.trains:
        return []
    return caveats(
        assumed=parts.source.assumed,
        splits=splits,
        attack=parts.attack,
        probe=parts.probe,
        before=before,
    )


def probed(
    parts: Parts, victim: Victim, purified: Normalized, clock: Clock, runtime: Runtime
) -> Evidence | None:
    """Evidence that needs no data, if it is asked for."""
    if parts.probe is None:
        return None
    with clock.stage("evidence"):
        return parts.probe(victim.network, purified, runtime)


def clean_baseline(
    request: VictimRequest, parts: Parts, evaluator: Evaluator | None
) -> dict[str, float | None] | None:
    """Rates of a clean-trained network of the same recipe under the same trigger, if asked for."""
    if not request.config["clean_baseline"] or evaluator is None or not parts.attack.active:
        return None
    clean = parts.source.obtain(request.without_attack()).network
    found = evaluator.predict(clean.to(request.runtime.device, request.runtime.dtype))
    rates: dict[str, float | None] = summarize(found, found, evaluator.truth)["victim"]
    return rates
