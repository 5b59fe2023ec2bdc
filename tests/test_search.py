"""The search: honest images, Hydra's grammar, and studies that continue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser

from dhbe.data import Budget, DefenderData, Resident
from dhbe.data.access import not_granted
from dhbe.errors import BudgetError, ConfigError
from sweeps.search import study, suggest

optuna = pytest.importorskip("optuna")


def test_judged_on_images_that_the_defender_never_sees(images: Resident) -> None:
    """80 images of 4 classes; each position is marked in its first pixel."""
    images.images[:, 0, 0, 0] = torch.arange(80, dtype=torch.uint8)
    budget = Budget(name="some", per_class=5, incoming=10)
    data = DefenderData(budget, pool=images, train_size=80, seed=3)
    seen = {int(x[0, 0, 0]) for s in (data.clean(), data.incoming()) for x in s.resident().images}
    rest = set(not_granted(budget, images.labels, 80, 3).tolist())
    assert len(seen) == 30
    assert not seen & rest
    assert len(rest) == 50
    assert len(not_granted(Budget(name="none"), images.labels, 80, 3)) == 80
    with pytest.raises(BudgetError, match="budget=all: grants all 80 images"):
        not_granted(Budget(name="all", fraction=1.0), images.labels, 80, 3)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a.b=interval(0.5,4)", 2.0),
        ("a.b=tag(log,interval(0.01,1))", 0.1),
        ("a.b=range(1,5)", 4),
        ("a.b=choice(x,y)", "y"),
    ],
)
def test_sweeps_of_hydra_are_searched(text: str, value: Any) -> None:
    (override,) = OverridesParser.create().parse_overrides([text])
    trial = optuna.trial.FixedTrial({"a.b": value})
    assert suggest(trial, override) == value
    log = getattr(trial.distributions["a.b"], "log", False)
    assert log == ("log" in text)


def test_a_study_continues_and_refuses_to_change(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/search.db"
    first = study("s", storage, "validation", ["a=interval(0,1)"], seed=0)
    first.optimize(lambda t: t.suggest_float("a", 0, 1), n_trials=3)
    again = study("s", storage, "validation", ["a=interval(0,1)"], seed=0)
    assert len(again.trials) == 3
    again.optimize(lambda t: t.suggest_float("a", 0, 1), n_trials=3)
    drawn = [t.params["a"] for t in again.trials]
    assert len(set(drawn)) == 6, "a continued study draws anew"
    with pytest.raises(ConfigError, match="choose another name"):
        study("s", storage, "validation", ["a=interval(0,2)"], seed=0)
    directions = [d.name for d in study("o", storage, "oracle", ["a=1"], seed=0).directions]
    assert directions == ["MAXIMIZE", "MINIMIZE"]
