"""Every switch leaves the numbers: games and victims with and without it, in double precision."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import partial

import pytest
import torch
from conftest import small
from test_attacks import build
from test_game import CPU, assert_same, make_game, play, players
from test_victim import schedule
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dhbe.core.errors import ConfigError
from dhbe.game import SeededNoise, add_patches
from dhbe.models.preact import PreActResNet18
from dhbe.models.resnet import SmallResNet, resnet
from dhbe.training import compile as acceleration
from dhbe.training.compile import blocks, compiled, recomputed
from dhbe.training.trainer import TrainerConfig
from dhbe.training.work import Counting
from dhbe.victim.train import train


def game_with(switch: Callable, *, iterations: int = 2):
    """A short game played under a switch."""
    game = make_game(*players(), SeededNoise(0, device=CPU, dtype=torch.float64), moves=2)
    with switch(game.networks):
        play(game, iterations=iterations)
    return game


def assert_same_games(ours, theirs, tolerance: float) -> None:
    for one, other in zip(ours.networks, theirs.networks, strict=True):
        assert_same(one, other, tolerance)


def test_recomputing_changes_no_weight_and_no_statistic() -> None:
    plain = game_with(lambda networks: recomputed(networks, False))
    thrifty = game_with(lambda networks: recomputed(networks, True))
    assert_same_games(thrifty, plain, 1e-12)
    untouched = make_game(*players(), SeededNoise(0, device=CPU, dtype=torch.float64))
    assert plain.student.state_dict().keys() == untouched.student.state_dict().keys()
    moved = zip(plain.student.parameters(), untouched.student.parameters(), strict=True)
    assert not any(torch.equal(a, b) for a, b in moved), "the game was played"


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str
)
@pytest.mark.parametrize("name", ["resnet18", "preact", "small"])
def test_recomputing_gives_loss_gradients_and_buffers(name: str, dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    network = network_of(name).to(dtype)
    images = torch.randn(4, 3, 16, 16, dtype=dtype)
    found = []
    for switch in (False, True):
        own = copy.deepcopy(network)
        with recomputed([own], switch):
            loss = own(images).square().mean()
            loss.backward()
        assert "forward" not in vars(blocks(own)[0]), "nothing stays behind"
        found.append({"loss": loss.detach()} | dict(own.named_buffers()))
        found[-1] |= {f"{k} grad": p.grad for k, p in own.named_parameters()}
    plain, thrifty = found
    for key, value in plain.items():
        torch.testing.assert_close(thrifty[key], value, rtol=tolerance, atol=tolerance)


def network_of(name: str) -> nn.Module:
    shape = {"classes": 4, "channels": 3, "image_size": 16}
    if name == "resnet18":
        return resnet(depth=18, stem="cifar", **shape)
    if name == "preact":
        return PreActResNet18(**shape)
    return SmallResNet(widths=[16, 24], blocks=2, stem_stride=1, **shape)


def kept_bytes(network: nn.Module, images: Tensor) -> int:
    """Bytes that a forward pass keeps for its backward pass, weights left out."""
    own = {p.data_ptr() for p in network.parameters()}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.data_ptr() not in own:
            kept[x.data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        network(images).sum().backward()
    return sum(kept.values())


def test_recomputing_keeps_a_third_of_the_memory() -> None:
    network, images = network_of("resnet18"), torch.randn(8, 3, 16, 16)
    plain = kept_bytes(network, images)
    with recomputed([network], True):
        assert kept_bytes(network, images) < plain / 3


def test_blocks_are_the_residual_ones() -> None:
    assert len(blocks(network_of("resnet18"))) == 8
    assert len(blocks(network_of("preact"))) == 8
    assert len(blocks(network_of("small"))) == 4
    _, generator, trigger = players()
    assert blocks(generator) == [*generator.blocks]
    assert len(blocks(trigger)) == len(trigger.blocks)


def test_a_network_without_blocks_says_so(caplog) -> None:
    with recomputed([nn.Sequential(nn.Linear(2, 2))], True):
        pass
    assert "Sequential has no residual blocks" in caplog.text


# ---------------------------------------------------------------- compilation


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


def test_no_compiler_means_eager_and_one_warning(caplog, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("/no/such/compiler",))
    torch.compiler.reset()
    network, images = network_of("small"), torch.randn(4, 3, 16, 16)
    expected = copy.deepcopy(network)
    with caplog.at_level(logging.WARNING), compiled([network], "default"):
        for net in (network, expected):
            for _ in range(2):
                net(images).sum().backward()
    assert caplog.text.count("is not compiled but runs as it is") == 1
    assert_same(network, expected, 0)


def test_batches_of_ever_new_sizes_end_uncompiled(caplog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceleration, "GRAPHS", 2)
    monkeypatch.setattr(torch, "compile", partial(traced, torch.compile))
    network = network_of("small")
    with compiled([network], "default"):
        for size in range(2, 7):
            assert network(torch.ones(size, 3, 16, 16)).shape == (size, 4)
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


def test_a_victim_is_the_same_with_less_memory(
    images, spec, compose_config, make_runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeated = []
    again = acceleration._still
    monkeypatch.setattr(acceleration, "_still", lambda b: repeated.append(b) or again(b))
    states = []
    for switch in (False, True):
        runtime = make_runtime(work=f"work{switch}", precision="64-true")
        runtime.trainer_config.recompute = switch
        network = small().to(torch.float64)
        train(network, build("wanet", compose_config, spec), images, schedule(), runtime)
        states.append(network)
        assert bool(repeated) == switch, "blocks are computed twice under the switch, and only then"
    assert_same(*states, 1e-12)


def test_switches_that_exclude_each_other_and_those_without_a_gpu(caplog) -> None:
    common = {"device": "cpu", "precision": "32-true", "threads": 0, "observe_every": 0}
    with pytest.raises(ConfigError, match=r"trainer\.recompute=True: expected false with"):
        TrainerConfig(**common, progress="never", compile="default", recompute=True)
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
