"""The search: honest images, Hydra's grammar, and studies that continue."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from dhbe.core.errors import BudgetError, ConfigError, DHBEError, DivergenceError
from dhbe.data import Budget, DefenderData, Resident
from dhbe.data.access import not_granted
from dhbe.sweeping.search import search, study, suggest

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


def options(folder: Path, trials: int, *, objective: str = "oracle") -> argparse.Namespace:
    """What the command line makes of ``s --trials N`` with one searched key."""
    overrides = ["defense=clp", "attack=blend", "defense.u=interval(1,9)"]
    overrides += ["data.limit=200", "data.train_size=7600", "model.widths=[16,24]"]
    overrides += ["victim.epochs=1", "trainer.threads=1"]
    overrides += [f"paths.results={folder}/results", f"paths.victims={folder}/victims"]
    known = {"name": "s", "objective": objective, "storage": None, "seed": 0}
    return argparse.Namespace(overrides=overrides, trials=trials, **known)


def states(folder: Path) -> list[str]:
    storage = f"sqlite:///{folder}/results/search.db"
    return [t.state.name for t in optuna.load_study(study_name="s", storage=storage).trials]


def test_a_lost_trial_is_not_one_of_those_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fates: list[BaseException | None] = [None, DivergenceError("nan"), None, KeyboardInterrupt()]
    folders = []

    def stub(cfg: DictConfig, folder: Path, choices: Any) -> dict[str, Any]:
        folders.append(folder)
        if fates and (fate := fates.pop(0)):
            raise fate
        return {"purified": {"acc": 0.5, "asr": 1 / cfg.defense.u}}

    monkeypatch.setattr("dhbe.sweeping.search.run", stub)
    with pytest.raises(KeyboardInterrupt):
        search(options(tmp_path, 4))
    assert states(tmp_path) == ["COMPLETE", "FAIL", "COMPLETE", "FAIL"]
    search(options(tmp_path, 4))
    assert states(tmp_path).count("COMPLETE") == 4
    search(options(tmp_path, 4))
    assert len(states(tmp_path)) == 6, "nothing is missing"
    assert {f.parent for f in folders} == {tmp_path / "search" / "s"}, "apart from the results"
    assert len(set(folders)) == 6


def test_a_shared_study_ends_when_all_processes_together_have_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = f"sqlite:///{tmp_path}/results/search.db"

    def stub(cfg: DictConfig, folder: Path, choices: Any) -> dict[str, Any]:
        other = optuna.load_study(study_name="s", storage=storage)
        other.add_trial(optuna.create_trial(values=[0.5, 0.5]))  # another process's
        return {"purified": {"acc": 0.5, "asr": 0.5}}

    monkeypatch.setattr("dhbe.sweeping.search.run", stub)
    search(options(tmp_path, 6))
    assert states(tmp_path) == ["COMPLETE"] * 6


def test_a_search_in_which_all_diverges_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stub(*_: Any) -> dict[str, Any]:
        raise DivergenceError("nan")

    monkeypatch.setattr("dhbe.sweeping.search.run", stub)
    with pytest.raises(DHBEError, match="s: 0 of 2 trials; the others diverged"):
        search(options(tmp_path, 2))


def test_a_search_for_real(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search(options(tmp_path, 2, objective="validation"))
    cells = list((tmp_path / "search" / "s").glob("*/metrics.json"))
    assert len(cells) == 2
    assert not list((tmp_path / "results").rglob("metrics.json")), "the report shows no tuned cell"
    assert "s: DER on pool images" in capsys.readouterr().out
