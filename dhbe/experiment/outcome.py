"""What one run has found, on its way into the result folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dhbe.evaluation.evaluator import Evaluator
from dhbe.evaluation.evidence import Evidence
from dhbe.evaluation.metrics import Predictions
from dhbe.experiment.assembly import Parts
from dhbe.experiment.clock import Clock
from dhbe.models import Normalized
from dhbe.training.runtime import Runtime
from dhbe.victim.store import Victim


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Both networks and all that was measured of them.

    Attributes:
        config: resolved completely.
        choices: name of the chosen config in each group.
        evaluator: None without test images; then there are no predictions either.
        before, after: of the victim and of the purified network.
        evidence: None where none was asked for.
        clean_baseline: rates of a clean-trained network under the same trigger, where asked for.
    """

    config: dict[str, Any]
    choices: Mapping[str, str]
    parts: Parts
    runtime: Runtime
    clock: Clock
    victim: Victim
    purified: Normalized
    evaluator: Evaluator | None
    before: Predictions | None
    after: Predictions | None
    evidence: Evidence | None
    clean_baseline: dict[str, float | None] | None
