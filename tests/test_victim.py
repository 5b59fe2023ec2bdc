"""Victims: stored once, keyed by everything that made them, checked when read; training resumes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dhbe import checkpoint
from dhbe.config.identity import fingerprint
from dhbe.core.errors import ArtefactError, DivergenceError
from dhbe.data import Resident, TrainingBatches
from dhbe.training.schedule import Cosine, Linear, Steps
from dhbe.training.supervised import Supervised
from dhbe.victim.store import FORMAT, Making, VictimStore
from dhbe.victim.train import train
from tests.conftest import tiered
from tests.support.attacks import badnets, build
from tests.support.defenses import suspect
from tests.support.fixtures import make_spec
from tests.support.victim import StopAfter, schedule


class Store:
    """A store and the means to ask it for a victim."""

    def __init__(self, root: Path, images: Resident, make_runtime) -> None:
        self.store, self.images, self.make_runtime = VictimStore(root), images, make_runtime
        self.trained = 0

    def obtain(self, recipe: dict):
        network, attack = suspect(recipe["seed"]).network, badnets(make_spec())

        def make(work: Path):
            self.trained += 1
            runtime = self.make_runtime(recipe["seed"], work=str(work), count=True)
            indicator = train(network, attack, self.images, schedule(), runtime)
            rows, work = runtime.recorder.rows, runtime.work_total.work
            return Making(indicator=indicator, curves=rows, work=work)

        return self.store.obtain(recipe, network, attack, make)


@pytest.fixture
def store(tmp_path: Path, images: Resident, make_runtime) -> Store:
    return Store(tmp_path / "victims", images, make_runtime)


def test_trained_once_and_read_back_whole(store: Store) -> None:
    first, again = store.obtain({"seed": 0}), store.obtain({"seed": 0})
    assert store.trained == 1
    assert (first.cached, again.cached) == (False, True)
    for key, value in first.network.state_dict().items():
        assert torch.equal(value, again.network.state_dict()[key])
    assert torch.equal(first.attack.patch, again.attack.patch)
    assert torch.equal(first.indicator, again.indicator)
    assert [r["victim/loss"] for r in again.curves] == [r["victim/loss"] for r in first.curves]
    assert first.work == again.work is not None
    about = store.store.root / fingerprint({"format": FORMAT, "seed": 0}) / "victim.json"
    found = json.loads(about.read_text())
    kept = {k: v for k, v in found.items() if k not in ("work", "seal", "measured")}
    about.write_text(json.dumps(kept))
    assert store.obtain({"seed": 0}).work is None, "made before work was counted"
    store.obtain({"seed": 1})
    assert store.trained == 2
    assert not list(store.store.root.glob("*.tmp")) + list(store.store.root.glob(".*.partial"))


def test_seconds_of_a_killed_attempt_count(store: Store, monkeypatch) -> None:
    def killed(*args) -> None:
        folder = args[4].workdir
        folder.mkdir()
        (folder / "seconds").write_text("2000.0")
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr("tests.test_victim.train", killed)
        with pytest.raises(InterruptedError):
            store.obtain({"seed": 0})
    assert 2000 < store.obtain({"seed": 0}).seconds < 3000
    assert 2000 < store.obtain({"seed": 0}).seconds < 3000, "read back"


def test_a_store_deleted_during_the_last_epoch_comes_back(store: Store, monkeypatch) -> None:
    original = train

    def deleting(*args):
        indicator = original(*args)
        shutil.rmtree(store.store.root)
        return indicator

    with monkeypatch.context() as patch:
        patch.setattr("tests.test_victim.train", deleting)
        made = store.obtain({"seed": 0})
    again = store.obtain({"seed": 0})
    assert (again.cached, store.trained) == (True, 1)
    assert torch.equal(made.indicator, again.indicator)


@pytest.mark.parametrize("damage", ["truncate", "flip", "edit recipe", "no json"])
def test_damage_is_detected_and_named(store: Store, damage: str) -> None:
    store.obtain({"seed": 0})
    (folder,) = (p for p in store.store.root.iterdir() if p.is_dir())
    weights, about = folder / "victim.safetensors", folder / "victim.json"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-10])
    if damage == "flip":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    if damage == "edit recipe":
        about.write_text(json.dumps(json.loads(about.read_text()) | {"recipe": {"seed": 9}}))
    if damage == "no json":
        about.unlink()
    with pytest.raises(ArtefactError, match=f"delete {folder} to train it anew"):
        store.obtain({"seed": 0})


def test_killed_training_resumes_to_the_same_weights(
    images: Resident, make_runtime, tmp_path: Path
) -> None:
    def fit(work: str, stop: int | None) -> dict[str, torch.Tensor]:
        network = suspect(0).network
        batches = TrainingBatches(
            images, spec=make_spec(), batch_size=16, seed=0, device=torch.device("cpu")
        )
        module = Supervised(network, batches, schedule(4), role="victim")
        callbacks = [] if stop is None else [StopAfter(stop)]
        make_runtime(work=work).fit(module, batches, epochs=4, callbacks=callbacks)
        return network.state_dict()

    whole = fit("whole", None)
    with pytest.raises(InterruptedError):
        fit("killed", 2)
    state = torch.load(tmp_path / "killed" / "last.ckpt", weights_only=True)
    assert state["epoch"] == 1  # the third epoch never ended; what follows goes on from here
    resumed = fit("killed", None)
    for key, value in whole.items():
        assert torch.equal(value, resumed[key]), key


@pytest.mark.parametrize("name", tiered(["wanet", "lira", "input_aware", "dfst"], "wanet".__eq__))
def test_killed_cotraining_resumes_to_the_same_weights(
    name: str, images: Resident, make_runtime, tmp_path: Path, compose_config, monkeypatch
) -> None:
    """The attack's own networks and their optimisers go on from the checkpoint, too."""

    def fit(work: str, stop: int | None) -> dict[str, torch.Tensor]:
        attack, network = build(name, compose_config, make_spec()), suspect(0).network.train()
        begin = attack.begin_epoch

        def kill(progress: float) -> None:
            begin(progress)
            if stop is not None and progress >= stop / 4:
                raise InterruptedError

        monkeypatch.setattr(attack, "begin_epoch", kill)
        train(network, attack, images, schedule(4), make_runtime(work=work))
        return {
            **network.state_dict(),
            **{f"attack.{k}": v for k, v in attack.state_dict().items()},
        }

    whole = fit("whole", None)
    with pytest.raises(InterruptedError):
        fit("killed", 2)
    resumed = fit("killed", None)
    for key, value in whole.items():
        assert torch.equal(value, resumed[key]), key


def test_diverged_training_stops(images: Resident, make_runtime) -> None:
    batches = TrainingBatches(
        images, spec=make_spec(), batch_size=16, seed=0, device=torch.device("cpu")
    )
    plan = schedule(2, learning_rate=1e30)
    module = Supervised(suspect().network, batches, plan, role="victim")
    with pytest.raises(DivergenceError, match="lower the learning rate"):
        make_runtime().fit(module, batches, epochs=2)


def test_schedules_are_fractions_of_the_budget() -> None:
    steps = schedule(shape=Steps(milestones=[0.5, 0.8], decay=0.1))
    assert [steps.factor(p) for p in (0, 0.49, 0.5, 0.9)] == pytest.approx([1, 1, 0.1, 0.01])
    cosine = schedule(shape=Cosine(end=0.0))
    assert [cosine.factor(p) for p in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])
    line = schedule(shape=Linear())
    assert [line.factor(p) for p in (0, 0.3, 1)] == pytest.approx([1, 0.7, 0])
    cycle = schedule()
    assert [cycle.factor(p) for p in (0, 0.2, 0.6, 1)] == pytest.approx([0, 1, 0.5, 0])


def test_checkpoints_of_others(tmp_path: Path) -> None:
    source, target = suspect(1).network, suspect(2).network
    inner = source.network.state_dict()
    files = {
        "plain.pt": inner,
        "nested.pth": {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in inner.items()}},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name)
    save_file(source.state_dict(), tmp_path / "own.safetensors")
    x = torch.rand(2, *source.spec.shape)
    for name in (*files, "own.safetensors"):
        target = suspect(2).network
        checkpoint.CheckpointFile(path=str(tmp_path / name)).load_into(target)
        assert torch.equal(target(x), source(x)), name


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_hostile_and_broken_checkpoints_are_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Payload()}, "bad.pt")
    Path("noise.pt").write_bytes(b"not a checkpoint")
    Path("noise.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    torch.save({"a": torch.zeros(2), "head.weight": torch.zeros(1)}, "other.pt")
    network = suspect().network
    for name, message in {
        "bad.pt": "nothing in it was executed",
        "noise.pt": "not a safetensors file or a plain state dict",
        "noise.safetensors": "not a safetensors file",
        "other.pt": "no state dict of tensors.*keys: a, head.weight",
        "absent.pt": "no such file",
    }.items():
        with pytest.raises(ArtefactError, match=message):
            checkpoint.CheckpointFile(path=name).load_into(network)
    assert not Path("executed").exists()
