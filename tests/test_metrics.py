"""Metrics against loops, edge networks, and published interval values."""

from __future__ import annotations

import numpy as np
import pytest

from dhbe.evaluation.metrics import Predictions, Rate, Truth, der, rates, summarize


def truth(n: int = 40, classes: int = 4, target: int = 0) -> Truth:
    labels = np.arange(n) % classes
    return Truth(labels=labels, goal=np.full(n, target), eligible=labels != target)


def test_ideal_network_and_always_target_network() -> None:
    t = truth()
    ideal = rates(Predictions(clean=t.labels, triggered=t.labels), t)
    assert [ideal[k].value for k in ("acc", "asr", "asr_conditional", "ra")] == [1, 0, 0, 1]
    always = rates(Predictions(clean=np.zeros(40, int), triggered=np.zeros(40, int)), t)
    assert always["asr"].value == 1
    assert always["acc"].value == 0.25
    assert always["ra"].value == 0
    assert always["asr_conditional"].value is None  # it classifies no eligible image correctly


def test_rates_by_loops() -> None:
    rng = np.random.default_rng(0)
    t = truth(200)
    p = Predictions(clean=rng.integers(0, 4, 200), triggered=rng.integers(0, 4, 200))
    found = rates(p, t)
    asr = conditional = ra = conditional_total = total = 0
    for i in range(200):
        if t.labels[i] == 0:
            continue
        total += 1
        asr += p.triggered[i] == 0
        ra += p.triggered[i] == t.labels[i]
        if p.clean[i] == t.labels[i]:
            conditional_total += 1
            conditional += p.triggered[i] == 0
    assert found["asr"] == Rate(hits=asr, total=total)
    assert found["ra"] == Rate(hits=ra, total=total)
    assert found["asr_conditional"] == Rate(hits=conditional, total=conditional_total)


def test_wilson_interval_by_formula() -> None:
    low, high = Rate(hits=81, total=263).interval
    assert (low, high) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, method 3
    assert Rate(hits=0, total=0).interval is None


def test_der_by_hand() -> None:
    assert der((0.9, 0.9), (1.0, 0.0)) == 1
    assert der((0.9, 0.8), (1.0, 0.1)) == pytest.approx(0.9)
    assert der((0.9, 0.95), (0.5, 0.6)) == 0.5


def test_summary_without_trigger_or_data() -> None:
    t = truth()
    clean_only = Predictions(clean=t.labels, triggered=None)
    found = summarize(clean_only, clean_only, t)
    assert found["victim"] == {"acc": 1.0, "asr": None, "asr_conditional": None, "ra": None}
    assert found["der"] is None
    assert summarize(None, None, None)["purified"]["acc"] is None
