"""The progress bar: stage, epochs, time left, and rates where the evaluation measured some."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dhbe.training import progress, runtime
from dhbe.training.progress import StageBar
from dhbe.training.recorder import Recorder
from dhbe.training.schedule import Constant, SGDSchedule
from tests.support.fixtures import make_spec, small


def test_description_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    bar = StageBar(Recorder())
    module = SimpleNamespace(role="victim")
    bar._trainer = SimpleNamespace(max_epochs=5, lightning_module=module)  # type: ignore[assignment]
    bar.begun, bar.first = 100.0, 2  # resumed in the third epoch
    monkeypatch.setattr(progress.time, "monotonic", lambda: 130.0)
    assert bar._get_train_description(2) == "victim: epoch 3/5"
    assert bar._get_train_description(3) == "victim: epoch 4/5, 0:01:00 left"


def test_a_training_shows_stage_and_rates(
    images: Any, make_runtime: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, dict[str, Any]]] = []

    class Spy(StageBar):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            text = self._get_train_description(trainer.current_epoch)
            seen.append((text, self.get_metrics(trainer, pl_module)))
            super().on_train_epoch_end(trainer, pl_module)

    monkeypatch.setattr(runtime, "StageBar", Spy)
    run = make_runtime()
    run.trainer_config.progress = True
    run.recorder = Recorder(lambda network: {"acc": 0.25, "asr": 0.5}, every=1)
    schedule = SGDSchedule(
        epochs=2,
        batch_size=40,
        learning_rate=0.1,
        momentum=0.0,
        weight_decay=0.0,
        nesterov=False,
        shape=Constant(),
    )
    run.recorder.observe(small(), epoch=0)
    run.train(small(), images, schedule, purpose="bar", spec=make_spec())
    assert seen[0][0] == "student: epoch 1/2"
    assert seen[1][0].startswith("student: epoch 2/2, 0:0")
    assert seen[1][1] == {"ACC": "25.0 %", "ASR": "50.0 %"}
