"""Outcome of one run, before it is written to the result folder."""

from __future__ import annotations

from dataclasses import dataclass

from dhbe.evaluation.evidence import Evidence
from dhbe.evaluation.metrics import Predictions
from dhbe.experiment.setting import Setting
from dhbe.models import Normalized
from dhbe.victim.store import Victim


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Both networks and all that was measured of them.

    Attributes:
        before, after: of the victim and of the purified network; None without test images.
        evidence: None where none was asked for.
        clean_baseline: rates of a clean-trained network under the same trigger, where asked for.
    """

    setting: Setting
    victim: Victim
    purified: Normalized
    before: Predictions | None
    after: Predictions | None
    evidence: Evidence | None
    clean_baseline: dict[str, float | None] | None
