"""Rates from counts of images."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge
from scipy.stats import binomtest


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A fraction with its counts; undefined (None) over nothing."""

    hits: Annotated[int, Ge(0)]
    total: Annotated[int, Ge(0)]

    @property
    def value(self) -> float | None:
        """Hits / total."""
        return self.hits / self.total if self.total else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Wilson's 95 % interval."""
        if not self.total:
            return None
        low, high = binomtest(self.hits, self.total).proportion_ci(0.95, method="wilson")
        return float(low), float(high)

    def as_dict(self) -> dict[str, int | list[float] | None]:
        """Counts and interval for ``metrics.json``."""
        interval = self.interval
        return {**asdict(self), "wilson95": None if interval is None else list(interval)}


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Classes (N,) that one network predicts for the test set, clean and triggered.

    Attributes:
        triggered: None if no trigger is known.
    """

    clean: np.ndarray
    triggered: np.ndarray | None


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What the test set says: labels (N,), goal labels (N,), who counts for ASR (N,) bool."""

    labels: np.ndarray
    goal: np.ndarray
    eligible: np.ndarray


def rate(hit: np.ndarray, among: np.ndarray) -> Rate:
    """Hits among the chosen ones; both (N,) bool."""
    return Rate(hits=int((hit & among).sum()), total=int(among.sum()))


def rates(predictions: Predictions, truth: Truth) -> dict[str, Rate | None]:
    """ACC, ASR, conditional ASR and RA of one network.

    acc: clean images classified as their label.
    asr: eligible images (true class is not the goal) classified as the goal under the trigger.
    asr_conditional: the same among those that this network classifies correctly when clean
        (DHBE's definition; without its 1e-5 guard, so undefined over none).
    ra: eligible images classified as their label under the trigger.
    """
    correct = predictions.clean == truth.labels
    everyone = np.ones_like(correct)
    found: dict[str, Rate | None] = {"acc": rate(correct, everyone)}
    if predictions.triggered is None:
        return found | {"asr": None, "asr_conditional": None, "ra": None}
    success = predictions.triggered == truth.goal
    return found | {
        "asr": rate(success, truth.eligible),
        "asr_conditional": rate(success, truth.eligible & correct),
        "ra": rate(predictions.triggered == truth.labels, truth.eligible),
    }


def der(acc: tuple[float, float], asr: tuple[float, float]) -> float:
    """Defense effectiveness rating of (before, after) pairs, in [0, 1].

    [max(0, drop of ASR) - max(0, drop of ACC) + 1] / 2.
    """
    return (max(0.0, asr[0] - asr[1]) - max(0.0, acc[0] - acc[1]) + 1) / 2


def summarize(
    victim: Predictions | None, purified: Predictions | None, truth: Truth | None
) -> dict[str, Any]:
    """The ``victim``, ``purified``, ``der`` and ``counts`` entries; None where undefined."""
    names = ("acc", "asr", "asr_conditional", "ra")
    found: dict[str, dict[str, Rate | None]] = {}
    for role, predictions in (("victim", victim), ("purified", purified)):
        found[role] = dict.fromkeys(names)
        if predictions is not None and truth is not None:
            found[role] = rates(predictions, truth)
    values = {
        role: {n: None if r is None else r.value for n, r in rs.items()}
        for role, rs in found.items()
    }
    pairs = [(values["victim"][n], values["purified"][n]) for n in ("acc", "asr")]
    known = all(v is not None for pair in pairs for v in pair)
    counts = {
        role: {n: None if r is None else r.as_dict() for n, r in rs.items()}
        for role, rs in found.items()
    }
    return {**values, "der": der(*pairs) if known else None, "counts": counts}  # type: ignore[arg-type]
