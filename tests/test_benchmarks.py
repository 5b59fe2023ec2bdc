"""The comparisons of ``benchmarks/`` run from end to end on a handful of images."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import evaluation_cost, precision, victim_speed
from dhbe.victim.train import MEASURED


@pytest.fixture(autouse=True)
def loud_afterwards() -> Iterator[None]:
    """The scripts silence warnings for the whole process."""
    yield
    logging.disable(logging.NOTSET)


def test_victim_epochs_take_turns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = ["data.limit=60", "victim.batch_size=16", "model.widths=[16]"]
    monkeypatch.setattr("sys.argv", ["", "--epochs", "2", "--workers", "0", *tiny])
    victim_speed.main()
    out = capsys.readouterr().out
    assert "epoch 2: " in out
    assert "(medians of 1 epochs)" in out


@pytest.mark.long
def test_the_evaluating_way_evaluates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After each of 2 + 2 epochs of RNP and at the end; its oracle at each of 20 thresholds."""
    tests = []
    predict = evaluation_cost.Evaluator.predict

    def counted(self, network, **limit):
        if limit != {"limit": MEASURED}:  # the store's own look at the victim
            tests.append(limit)
        return predict(self, network, **limit)

    monkeypatch.setattr(evaluation_cost.Evaluator, "predict", counted)
    options = ["data.limit=200", "model.widths=[16]", f"paths.victims={tmp_path}"]
    options += ["victim.epochs=1", "defense.stop_accuracy=0", "budget=pct5"]
    options += [f"defense.{part}_schedule.epochs=2" for part in ("unlearn", "recover")]
    arguments = ["", "--rounds", "1", "--defenses", "rnp", "--set", *options]
    monkeypatch.setattr("sys.argv", arguments)
    evaluation_cost.main()
    once, always = 1, 2 + 2 + 1 + 20 + 1
    assert len(tests) == 2 * (once + always)  # a round before the first is not counted
    assert "ratio" in capsys.readouterr().out


def test_one_victim_is_purified_in_each_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = ["data=cifar10_mini", "data.limit=200", "model.widths=[16]", "victim.epochs=1"]
    tiny += ["defense.schedule.epochs=1", "trainer.threads=0", f"paths.victims={tmp_path}"]
    arguments = ["", "cpu_badnets", "--defense", "finetune", "--seeds", "0", "--set", *tiny]
    monkeypatch.setattr("sys.argv", [*arguments, "--precisions", "32-true", "bf16-mixed"])
    used = []
    fit = precision.Runtime.fit

    def watched(self, *args, **options):
        used.append(self.trainer_config.precision)
        return fit(self, *args, **options)

    monkeypatch.setattr(precision.Runtime, "fit", watched)
    precision.main()
    assert used[-2:] == ["32-true", "bf16-mixed"]
    assert len(list(tmp_path.glob("*/victim.json"))) == 1, "both start from the same network"
    first, second = (line.split("%, ") for line in capsys.readouterr().out.splitlines()[1:])
    assert first[0].startswith("seed 0, 32-true: ACC ")
    assert second[0].startswith("seed 0, bf16-mixed: ACC ")
