"""Compose ``metrics.json``: setting, hardware, seconds, rates."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from torch import Tensor

from dhbe.config import identity
from dhbe.core.provenance import commit, versions
from dhbe.core.types import POISON
from dhbe.evaluation.metrics import summarize
from dhbe.experiment.outcome import Outcome
from dhbe.training import work

GROUPS = ("data", "model", "attack", "defense", "budget", "scale")
"""Config groups whose choices stand in ``metrics.json``."""


def metrics(outcome: Outcome) -> dict[str, Any]:
    """Everything that ``metrics.json`` holds."""
    truth = None if outcome.setting.evaluator is None else outcome.setting.evaluator.truth
    found = summarize(outcome.before, outcome.after, truth) | circumstances(outcome)
    found |= {g: outcome.setting.choices.get(g) or "custom" for g in GROUPS}
    if outcome.evidence is not None:
        found["evidence"] = outcome.evidence.as_dict()
    found |= detection(outcome)
    found |= isolation(outcome.setting.runtime.recorder.isolated, outcome.victim.indicator)
    if outcome.clean_baseline is not None:
        found["clean_baseline"] = outcome.clean_baseline
    return found


def circumstances(outcome: Outcome) -> dict[str, Any]:
    """What was run, where and how long it took."""
    victim, setting = outcome.victim, outcome.setting
    runtime, trainer, clock = setting.runtime, setting.parts.trainer, setting.clock
    seconds = clock.seconds | {"victim": victim.seconds}
    counted = {"victim": victim.work, "defense": runtime.work_total.work}
    poisoned = float((victim.indicator == POISON).float().mean()) if len(victim.indicator) else None
    return {
        "cell": identity.cell_name(setting.config),
        "selection": setting.parts.defense.selection,
        "idle": setting.parts.defense.idle,
        "seed": setting.config["seed"],
        "poison_rate": setting.parts.attack.poison_rate,
        "poisoned": poisoned,
        "seconds": {"defense": 0.0, "evaluate": 0.0} | seconds,
        "flops": {k: w and w.flops for k, w in counted.items()},
        "bytes": {k: w and w.bytes for k, w in counted.items()},
        "trained_seconds": {k: w and w.seconds for k, w in counted.items()},
        "peak_flops": work.peak(trainer.device),
        "cached_victim": victim.cached,
        "peak_memory_mb": max(clock.peaks.values()),
        "stage_peak_memory_mb": clock.peaks,
        "precision": trainer.precision,
        "device": str(trainer.device),
        "device_name": work.device_name(trainer.device),
        "notes": runtime.recorder.notes,
        "versions": versions(),
        "commit": commit(),
    }


def detection(outcome: Outcome) -> dict[str, Any]:
    """The classes that a detector suspects, beside the attack's targets (None: not known).

    ``scores``: of all classes, from detectors that rank them.
    """
    recorder = outcome.setting.runtime.recorder
    if recorder.suspected is None:
        return {}
    targets = None
    if outcome.setting.evaluator is not None and outcome.setting.parts.attack.active:
        truth = outcome.setting.evaluator.truth
        targets = np.unique(truth.goal[truth.eligible]).tolist()
    found = {"classes": recorder.suspected, "targets": targets}
    return {"suspected": found | ({"scores": recorder.scores} if recorder.scores else {})}


def isolation(positions: list[int] | None, indicator: Tensor) -> dict[str, Any]:
    """How much of what a defense isolated from the training set is poison.

    Args:
        indicator: of the training images (N,); empty if they are not known.
    """
    if positions is None or not len(indicator):
        return {}
    poison = int((indicator[positions] == POISON).sum())
    return {"isolated": {"images": len(positions), "poison": poison}}


def dump(metrics: dict[str, Any]) -> str:
    """Strict JSON; what is not finite becomes null."""
    return json.dumps(without_nan(metrics), indent=1, allow_nan=False) + "\n"


def without_nan(value: Any) -> Any:
    """The value with None for NaN and infinities."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
