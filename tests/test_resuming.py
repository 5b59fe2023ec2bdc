"""Damaged states of a training: noticed, set aside, and the result is the one without damage."""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from dhbe.data import Resident, TrainingBatches
from dhbe.training.recorder import Stopwatch
from dhbe.training.resuming import FORMER, FRESH, LAST, newest, seal, sound
from dhbe.training.supervised import Supervised
from tests.conftest import sampled
from tests.support.defenses import suspect
from tests.support.fixtures import make_spec
from tests.support.victim import StopAfter, schedule

EPOCHS = 4
Fit = Callable[[str, int | None], dict[str, torch.Tensor]]


@pytest.fixture
def fit(images: Resident, make_runtime) -> Fit:
    """Trains in a folder, perhaps killed after some epochs; gives the weights."""

    def trained(work: str, stop: int | None) -> dict[str, torch.Tensor]:
        network = suspect(0).network
        batches = TrainingBatches(
            images, spec=make_spec(), batch_size=16, seed=0, device=torch.device("cpu")
        )
        module = Supervised(network, batches, schedule(EPOCHS), role="victim")
        callbacks = [] if stop is None else [StopAfter(stop)]
        runtime = make_runtime(work=work)
        runtime = replace(runtime, stopwatch=Stopwatch(runtime.workdir))
        runtime.fit(module, batches, epochs=EPOCHS, callbacks=callbacks)
        return network.state_dict()

    return trained


def flip(file: Path) -> None:
    """One bit of a weight."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda f: f.write_bytes(b""),
    "truncated": lambda f: f.write_bytes(f.read_bytes()[: f.stat().st_size // 2]),
    "foreign": lambda f: torch.save({"epoch": 1, "state_dict": {}}, f),
    "text": lambda f: f.write_text("<html>not found</html>"),
    "flipped bit": flip,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_set_aside_and_the_weights_are_the_same(
    fit: Fit, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = fit("whole", None)
    with pytest.raises(InterruptedError):
        fit("killed", 3)
    folder = tmp_path / "killed"
    DAMAGE[damage](folder / LAST)
    with caplog.at_level(logging.WARNING):
        assert newest(folder) == folder / FORMER
    assert f"{folder / LAST}: damaged checkpoint" in caplog.text
    assert (folder / "last.damaged").exists()
    assert torch.load(folder / FORMER, weights_only=True)["epoch"] == 1
    resumed = fit("killed", None)
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


def test_with_both_states_damaged_it_begins_anew(fit: Fit, tmp_path: Path) -> None:
    whole = fit("whole", None)
    with pytest.raises(InterruptedError):
        fit("killed", 3)
    for name in (LAST, FORMER):
        flip(tmp_path / "killed" / name)
    resumed = fit("killed", None)
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


@pytest.mark.parametrize(
    "step", sampled(["resuming.seal", "resuming.replace", "recorder.replace"], 3)
)
def test_a_folder_deleted_while_a_state_is_saved_comes_back(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Deleted before one step of the first saving: same weights, and the last state is there."""
    whole = fit("whole", None)
    folder, times = tmp_path / "deleted", iter([True])
    module, name = step.split(".")
    original = getattr(import_module(f"dhbe.training.{module}"), name)

    def after_deletion(*files: Path) -> None:
        if next(times, False):
            shutil.rmtree(folder)
        original(*files)

    monkeypatch.setattr(f"dhbe.training.{step}", after_deletion)
    found = fit(folder.name, None)
    assert all(torch.equal(value, found[key]) for key, value in whole.items())
    assert sound(folder / LAST)


def test_a_kill_between_the_two_names_loses_nothing(tmp_path: Path) -> None:
    torch.save({"epoch": 2}, tmp_path / FRESH)
    torch.save({"epoch": 1}, tmp_path / FORMER)
    seal(tmp_path / FORMER)
    assert newest(tmp_path) == tmp_path / FORMER, "not sealed: killed while it wrote"
    seal(tmp_path / FRESH)
    assert newest(tmp_path) == tmp_path / FRESH
    assert not list(tmp_path.glob("*.damaged"))


def test_every_bit_is_under_the_seal(tmp_path: Path) -> None:
    file = tmp_path / LAST
    torch.save({"weights": torch.arange(10.0)}, file)
    seal(file)
    assert sound(file)
    assert torch.load(file, weights_only=True)["weights"].sum() == 45, "still torch's format"
    content = file.read_bytes()
    for place in random.Random(0).sample(range(len(content)), 200):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert not sound(file), place


@pytest.mark.parametrize("damage", ["", "abc", "nan", "-1"])
def test_damaged_seconds_cost_no_training(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "seconds").write_text(damage)
    with caplog.at_level(logging.WARNING):
        watch = Stopwatch(tmp_path)
    assert 0 <= watch.seconds < 10
    assert "damaged" in caplog.text
    watch.save()
    assert Stopwatch(tmp_path).seconds < 10
