"""Several processes with a part of each batch follow one process with the whole batch."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.types import RunMode
from omegaconf import DictConfig
from torch import nn

from dhbe.core.errors import ConfigError
from dhbe.core.rng import fork
from dhbe.data import Resident, TrainingBatches
from dhbe.experiment.pipeline import run
from dhbe.game import (
    Distillation,
    FaintTriggers,
    ImageGenerator,
    LossWeights,
    SeededNoise,
    TriggerNetwork,
)
from dhbe.models import Normalized
from dhbe.training import parallel as processes
from dhbe.training.recorder import Recorder
from dhbe.training.runtime import Runtime
from dhbe.training.schedule import Cosine, SGDSchedule
from dhbe.training.supervised import Supervised
from dhbe.training.trainer import TrainerConfig
from tests.support.commands import Command
from tests.support.fixtures import make_spec
from tests.support.game import PUBLISHED_RATES

CPU = torch.device("cpu")


def network() -> Normalized:
    with fork(0):
        inner = nn.Sequential(
            *(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
            *(nn.Conv2d(4, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)),
        )
    return Normalized(inner, make_spec()).double()


def victim(net: Normalized) -> tuple[Supervised, TrainingBatches]:
    """Two epochs of plain training on 32 images in batches of 8."""
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (32, 3, 16, 16), generator=rng, dtype=torch.uint8)
    data = Resident(pixels, torch.arange(32) % 4)
    batches = TrainingBatches(data, spec=make_spec(), batch_size=8, seed=0, device=CPU)
    schedule = SGDSchedule(
        epochs=2,
        batch_size=8,
        learning_rate=0.1,
        momentum=0.9,
        nesterov=True,
        weight_decay=0.0,
        shape=Cosine(end=0.0),
    )

    def loss(network: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(network(batch.images.double()), batch.labels)

    return Supervised(net, batches, schedule, role="victim", loss=loss), batches


def game(net: Normalized) -> Distillation:
    """Two epochs in which every player and every term of the losses takes part."""
    with fork(1):
        generator = ImageGenerator(latent=8, width=4, channels=3, image_size=20)
        trigger_network = TriggerNetwork(latent=8, width=4, channels=3, patch_size=3)
        faint_triggers = FaintTriggers(
            count=2, latent=8, width=4, channels=3, image_size=20, amplitude=0.1
        )
    return Distillation(
        net.network,
        std=net.std,
        generator=generator.double(),
        trigger_network=trigger_network.double(),
        faint_triggers=faint_triggers.double(),
        noise=SeededNoise(0, device=CPU, dtype=torch.float64),
        weights=LossWeights(patch=0.5, faint=0.2, tv1=1e-3, tv2=1e-2, balance=1.0, statistics=0.5),
        rates=replace(
            PUBLISHED_RATES,
            student=0.05,
            generator=1e-2,
            trigger_network=1e-2,
            weight_decay=0.0,
            milestones=(0.5,),
        ),
        batch_size=8,
        student_moves=2,
        epochs=2,
        warm_up=2,
        averaging=0.5,
    )


def train(folder: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """A victim, then the game from what it became; all losses, and the student."""
    config = TrainerConfig(
        device="cpu", precision="64-true", threads=1, progress="never", observe_every=0
    )
    net, rows = network(), []
    trained, batches = victim(net)
    played = game(net)
    for name, what, source in (("victim", trained, batches), ("game", played, range(2))):
        recorder = Recorder()
        runtime = Runtime(trainer_config=config, seed=0, workdir=folder / name, recorder=recorder)
        runtime.fit(what, source, epochs=2)
        rows += recorder.rows
    return rows, played.purified.state_dict()


def worker(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with processes.group(2, CPU):
        assert processes.agree(rank) == 0
        x = torch.tensor(rank + 1.0, requires_grad=True)
        total = processes.Processes().all_reduce_sum(x)
        gradient, *_ = torch.autograd.grad(total**2, x, create_graph=True)
        second = torch.autograd.grad(gradient, x)
        assert (gradient.item(), *second) == (12.0, 8.0)  # 2 (2 sum), 2 (2 2)
        torch.save(train(folder), folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(rows, student) of one process, and of each of two."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    started = [
        Command([os.devnull], cwd=folder, before=partial(worker, rank, port, folder))
        for rank in (0, 1)
    ]
    for process in started:
        _, said = process.communicate()
        assert process.returncode == 0, said
    two = [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]
    return train(folder / "one"), *two


@pytest.mark.long
def test_two_processes_follow_one(both: Any) -> None:
    (one, student), (two, other), _ = both
    assert len(one) == 4
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        assert all(b[k] == pytest.approx(a[k], abs=1e-9) for k in a)
    assert len({row.get("student/distill") for row in one}) == 3, "the losses do move"
    for name, value in student.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=1e-9)


@pytest.mark.long
def test_all_processes_end_alike(both: Any) -> None:
    _, (_, first), (_, second) = both
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_one_process_is_the_identity() -> None:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    kept = x.clone()
    alone = processes.Processes()
    alone.average([x])
    assert torch.equal(x[alone.rows(5)], kept)
    assert alone.all_reduce_norm(x) is alone.all_reduce_mean(x) is alone.all_reduce_sum(x) is x
    assert (alone.count, alone.rank, alone.first, alone.agree(3)) == (1, 0, True, 3)


def test_an_uneven_batch_is_not_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "count", lambda: 2)
    two = processes.Processes()
    assert two.rows(5) == slice(None)
    assert two.rows(6) == slice(0, 3)


def test_only_from_the_command_line_and_never_in_a_sweep() -> None:
    with pytest.raises(ConfigError, match=r"trainer.processes=2: expected 1 except in a single"):
        processes.launch(2)


def test_a_cell_of_a_sweep_has_one_process_also_under_torchrun(
    compose_config: Callable[..., DictConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = compose_config("trainer=ddp", "trainer.device=cpu")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(processes.HydraConfig, "initialized", lambda: True)
    hydra = SimpleNamespace(mode=RunMode.MULTIRUN)
    monkeypatch.setattr(processes.HydraConfig, "get", lambda: hydra)
    with pytest.raises(ConfigError, match=r"trainer.processes=2: .*hydra/launcher=joblib"):
        run(cfg, tmp_path / "abc", {})
    processes.refuse_multirun(1)
    hydra.mode = RunMode.RUN
    processes.refuse_multirun(2)
