"""One run: config, data, attack, victim, suspect, defense, evaluation, result folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dhbe.config import identity
from dhbe.config.resolution import resolved
from dhbe.config.schema import plain
from dhbe.experiment.assembly import Parts, assemble
from dhbe.experiment.contents import save_weights, write
from dhbe.experiment.folder import ResultFolder
from dhbe.experiment.outcome import Outcome
from dhbe.experiment.setting import Setting
from dhbe.experiment.summary import metrics as metrics_of
from dhbe.experiment.trackers import Untroubled
from dhbe.experiment.tracking import report, tracked
from dhbe.models import Normalized
from dhbe.report.console import show
from dhbe.training import parallel as processes


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
            return result.metrics(identity.cell_name(tree))
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
    metrics = result.metrics(identity.cell_name(tree))
    show(metrics, result.path, reused=True)
    return metrics


def compute(
    tree: dict[str, Any],
    parts: Parts,
    result: ResultFolder,
    choices: Mapping[str, str],
    logger: Untroubled | None,
) -> tuple[dict[str, Any], Normalized]:
    """The run itself, into ``result``: its metrics and the purified network."""
    parts.trainer.apply()
    cell = identity.cell_name(tree)
    setting = Setting.of(tree, parts, choices, result.open(cell) / "training", logger)
    victim = setting.victim()
    before = setting.predictions(victim.network, victim.sha256)
    purified = setting.purified(victim)
    if processes.first():  # before anything else can go wrong
        source = None if parts.defense.idle else parts.source
        save_weights(result.open(cell), tree, source, purified)
    after = before if parts.defense.idle else setting.predictions(purified)
    setting.runtime.recorder.notes += setting.caveats(before)
    outcome = Outcome(
        setting=setting,
        victim=victim,
        purified=purified,
        before=before,
        after=after,
        evidence=setting.evidence(victim, purified),
        clean_baseline=setting.clean_baseline(),
    )
    metrics = metrics_of(outcome)
    if processes.first():
        report(logger, metrics, setting.runtime.recorder.pictures)
        write(result.open(cell), outcome, metrics)  # again: the folder may have been deleted
        result.publish()
    return metrics, purified
