"""Every switch leaves the numbers: games and victims with and without it, in double precision."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from dhbe.game import SeededNoise, add_patches
from dhbe.models.preact import PreActResNet18
from dhbe.models.resnet import SmallResNet, resnet
from dhbe.training import compile as acceleration
from dhbe.training.compile import compiled
from dhbe.training.trainer import TrainerConfig
from dhbe.training.work import Counting
from tests.support.game import CPU, assert_same, make_game, play, players


def game_with(switch: Callable, *, iterations: int = 2):
    """A short game played under a switch."""
    game = make_game(*players(), SeededNoise(0, device=CPU, dtype=torch.float64), moves=2)
    with switch(game.networks):
        play(game, iterations=iterations)
    return game


def assert_same_games(ours, theirs, tolerance: float) -> None:
    for one, other in zip(ours.networks, theirs.networks, strict=True):
        assert_same(one, other, tolerance)


def network_of(name: str) -> nn.Module:
    shape = {"classes": 4, "channels": 3, "image_size": 16}
    if name == "resnet18":
        return resnet(depth=18, stem="cifar", **shape)
    if name == "preact":
        return PreActResNet18(**shape)
    return SmallResNet(widths=[16, 24], blocks=2, stem_stride=1, **shape)


# ---------------------------------------------------------------- compilation


@pytest.mark.long
def test_compiling_changes_no_number_of_a_game(monkeypatch: pytest.MonkeyPatch) -> None:
    """All modes and gradients of the game, traced as for any compiler, within 1e-10 of eager."""
    plain = game_with(lambda networks: compiled(networks, "never"))
    monkeypatch.setattr(torch, "compile", partial(traced, torch.compile))
    torch.compiler.reset()
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)  # it forgets its counts, too
    fast = game_with(lambda networks: compiled(networks, "default"))
    assert_same_games(fast, plain, 1e-10)
    assert fast.student._compiled_call_impl is None
    # student: trained, frozen with and without gradient; G, P: with and without; teacher: likewise.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 9


def traced(compile: Callable, call: Callable, *, mode: str, **options) -> Callable:
    return compile(call, backend="aot_eager", **options)


@pytest.mark.long
def test_compiling_for_real_is_rounding() -> None:
    """Inductor's code, within 1e-10 of eager in double, BatchNorm statistics included."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).double()
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    states = []
    for mode in ("never", "default"):
        own = copy.deepcopy(network)
        with compiled([own], mode):
            own(images).square().mean().backward()
        states.append(own)
    eager, fast = states
    assert_same(fast, eager, 1e-10)
    for a, b in zip(fast.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-10, rtol=1e-10)


@pytest.mark.long
def test_no_compiler_means_eager_and_one_warning(caplog, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("/no/such/compiler",))
    torch.compiler.reset()
    network, images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.randn(4, 3, 8, 8)
    expected = copy.deepcopy(network)
    with caplog.at_level(logging.WARNING), compiled([network], "default"):
        for net in (network, expected):
            for _ in range(2):
                net(images).sum().backward()
    assert caplog.text.count("is not compiled but runs as it is") == 1
    assert_same(network, expected, 0)


@pytest.mark.long
def test_batches_of_ever_new_sizes_end_uncompiled(caplog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceleration, "GRAPHS", 2)
    monkeypatch.setattr(torch, "compile", partial(traced, torch.compile))
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))
    with compiled([network], "default"):
        for size in range(2, 7):
            assert network(torch.ones(size, 3, 8, 8)).shape == (size, 4)
        assert network._compiled_call_impl is None
    assert caplog.text.count("is not compiled but runs as it is") == 1


def test_the_work_of_compiled_networks_is_counted_operator_by_operator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network, images = network_of("small"), torch.randn(4, 3, 16, 16)
    with Counting() as plain:
        network(images).sum().backward()
    fused: list[int] = []
    monkeypatch.setattr(torch, "compile", lambda call, **_: record(call, fused))
    with compiled([network], "default"), Counting() as counted:
        network(images).sum().backward()
    assert counted.flops == plain.flops > 0
    assert fused == [], "a fused kernel would not have been counted"


def test_passes_beside_the_training_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    network = network_of("small").eval()
    shapes = []
    monkeypatch.setattr(torch, "compile", lambda call, **_: record(call, shapes))
    with compiled([network], "default"):
        network(torch.zeros(2, 3, 16, 16))
        assert shapes == [2]
        assert copy.deepcopy(network)._compiled_call_impl is None
        assert not any("orig_mod" in k for k in network.state_dict())


def record(call: Callable, shapes: list[int]) -> Callable:
    def counted(x: Tensor) -> Tensor:
        shapes.append(len(x))
        return call(x)

    return counted


# ---------------------------------------------------------------- the rest


def test_places_on_a_device_are_those_of_integers() -> None:
    noise = SeededNoise(3, device=CPU, dtype=torch.float64)
    left, top = noise.place(13)
    again = torch.Generator().manual_seed(noise.places.initial_seed())
    assert [int(left), int(top)] == torch.randint(14, (2,), generator=again).tolist()
    x, std = torch.randn(2, 3, 16, 16, dtype=torch.float64), torch.full((1, 3, 1, 1), 0.2).double()
    gradients = []
    for place in ((left, top), (int(left), int(top))):
        patches = torch.ones(2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
        out = add_patches(x, patches, std, *place)
        out.square().sum().backward()
        gradients.append((out.detach(), patches.grad))
    expected = x.clone()
    expected[:, :, int(top) : int(top) + 3, int(left) : int(left) + 3] += 1 / std
    for out, gradient in gradients:
        assert torch.equal(out, expected)
        assert torch.equal(gradient, gradients[0][1])


def test_switches_without_a_gpu(caplog) -> None:
    common = {"device": "cpu", "precision": "32-true", "threads": 0, "observe_every": 0}
    assert not TrainerConfig(**common, progress="never", tf32=True).tf32
    assert "trainer.tf32: there is no GPU here" in caplog.text


def test_tf32_is_what_the_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU as far as it goes: which settings are made."""
    common = {"device": "cpu", "precision": "32-true", "threads": 0, "observe_every": 0}
    config = TrainerConfig(**common, progress="never")
    told = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", told.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    config.apply()
    assert told == []
    config.device = torch.device("cuda")
    for config.tf32 in (True, False):
        config.apply()
        assert torch.backends.cudnn.allow_tf32 == config.tf32
    assert told == ["high", "highest"]


def test_steps_begin_only_where_there_are_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    marks = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    loaded = {"torch._inductor.cudagraph_trees": object()}
    for modules, expected in (({}, 0), (loaded, 1)):
        monkeypatch.setattr(acceleration.sys, "modules", modules)
        acceleration.begin_step()
        assert len(marks) == expected
