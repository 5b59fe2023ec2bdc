"""Shortcuts: finding, scaling and training them apart (SSFT)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from defenses.ssft import SSFT, critical
from dhbe.checkpoint import CheckpointFile
from dhbe.core.errors import ArtefactError, ConfigError
from dhbe.data import Budget, DefenderData, Resident
from dhbe.experiment.contents import save_weights
from dhbe.models import Normalized
from dhbe.models.other import vgg19_bn
from dhbe.models.preact import PreActResNet18, WideResNet
from dhbe.models.resnet import resnet
from dhbe.models.shortcuts import (
    Gate,
    blocks,
    gate_is_exact,
    scalable_layer,
    scale_shortcut,
    stage_of,
)
from dhbe.victim.memory import InMemoryVictim
from tests.support.attacks import tiny
from tests.support.defenses import batch, build, granted
from tests.support.fixtures import make_spec

SPEC = make_spec()


def test_suppressed_shortcuts() -> None:
    network = resnet(depth=18, stem="cifar", classes=10, channels=3, image_size=32).eval()
    found = blocks(network, method="ssft", least=8)
    assert len(found) == 8
    x = torch.randn(1, 64, 8, 8)
    identity = copy.deepcopy(found[1])
    scale_shortcut(identity, 0.0)
    assert isinstance(identity.downsample, Gate)
    y = identity.bn2(identity.conv2(F.relu(identity.bn1(identity.conv1(x))))).relu()
    torch.testing.assert_close(identity(x), y)
    assert identity.state_dict().keys() == found[1].state_dict().keys()
    convolutional = copy.deepcopy(found[2])
    scale_shortcut(convolutional, 0.0)
    assert convolutional.downsample(x).abs().max() == 0
    assert [b in found[2:4] for b in stage_of(network, found[3])] == [True, True]


TINY = {"classes": 4, "channels": 3, "image_size": 16}


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(partial(WideResNet, depth=16, widen=1, **TINY), id="wrn"),
        pytest.param(partial(PreActResNet18, **TINY), id="preact", marks=pytest.mark.long),
        pytest.param(
            partial(resnet, depth=18, stem="cifar", **TINY), id="resnet18", marks=pytest.mark.long
        ),
    ],
)
def test_a_shortcut_times_one_is_the_shortcut(make: Callable[[], nn.Module]) -> None:
    network = Normalized(make(), SPEC)
    network(torch.rand(8, *SPEC.shape))  # statistics of something
    network.eval()
    x, _ = batch()
    with torch.no_grad():
        for position, block in enumerate(blocks(network, method="x", least=6)):
            scaled = copy.deepcopy(network)
            scale_shortcut(blocks(scaled, method="x", least=6)[position], 1.0)
            torch.testing.assert_close(scaled(x), network(x), msg=f"block {position}")
            half = copy.deepcopy(network)
            scale_shortcut(blocks(half, method="x", least=6)[position], 0.5)
            assert not torch.allclose(half(x), network(x)), f"block {position}"
            if scalable_layer(block) is None:
                assert gate_is_exact(network, position)
            else:
                plain = copy.deepcopy(network)
                plain.load_state_dict(half.state_dict())
                assert torch.equal(plain(x), half(x)), "in the weights"


class Stranger(nn.Module):
    """Adds twice its input; whoever gates a shortcut changes it."""

    def __init__(self) -> None:
        super().__init__()
        self.downsample: nn.Module | None = None
        self.conv2 = nn.Conv2d(3, 3, 3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skipped = 2 * x if self.downsample is None else self.downsample(x)
        out: torch.Tensor = self.conv2(x) + skipped
        return out


def ssft(compose_config, **options) -> SSFT:
    method = build("ssft", compose_config, **options)
    assert isinstance(method, SSFT)
    return method


def test_positions_that_do_not_exist_are_refused(compose_config, images, make_runtime) -> None:
    network, data = tiny(SPEC), granted(images, fraction=0.1)
    for block in (2, 12, -3):
        method = ssft(compose_config, selection="fixed", block=block)
        with pytest.raises(ConfigError, match=rf"defense\.block={block}: expected one of 0, 1,"):
            method.repair(network, data, make_runtime())
    assert method.places(network, weights_only=True) == [1]
    method.block = -2
    runtime = make_runtime()
    runtime.weights_only = True
    with pytest.raises(ConfigError, match=r"defense\.block=-2: expected one of 1 \(shortcuts"):
        method.repair(network, data, runtime)
    network = Normalized(nn.Sequential(Stranger(), nn.Flatten(), nn.Linear(768, 4)), SPEC).eval()
    with pytest.raises(ConfigError, match="1 residual blocks has weights that could be suppressed"):
        ssft(compose_config).places(network, weights_only=False)


def test_what_weights_do_not_say_is_said_and_not_loaded(
    compose_config, images, make_runtime, tmp_path
) -> None:
    runtime, data = make_runtime(), granted(images, fraction=0.1)
    method = ssft(compose_config, selection="fixed", block=0)
    repaired = method.repair(tiny(SPEC), data, runtime)
    assert "network.stages.0.0 has no shortcut any more" in runtime.recorder.notes[1]
    tree = {"data": {"name": "x", "image_size": 32}, "model": {}}
    save_weights(tmp_path, tree, InMemoryVictim(nn.Identity()), repaired)
    with pytest.raises(ArtefactError, match=r"not the network that was .*stages\.0\.0 has"):
        CheckpointFile(path=str(tmp_path / "purified.safetensors")).load_into(tiny(SPEC))
    folded = ssft(compose_config, selection="fixed", block=1).repair(tiny(SPEC), data, runtime)
    assert folded.unwritten == ""


@pytest.mark.long
def test_the_published_choice_is_the_shortcut_with_the_largest_jump(images: Resident) -> None:
    def measure(net) -> dict[str, float]:
        inner = [b.downsample for b in blocks(net, method="x", least=1)]
        first, second = (g.factor if isinstance(g, Gate) else 1.0 for g in inner[:2])
        return {"acc": 0.9, "asr": 0.6 * (second > 0.45) + 0.3 * (first > 0.45)}

    network = resnet(depth=18, stem="cifar", classes=10, channels=3, image_size=32)
    data = DefenderData(Budget(), pool=images, train_size=400, seed=0, oracle=measure)
    assert critical(network, [*range(8)], data) == 1
    assert critical(network, [0, 3], data) == 0


@pytest.mark.long
def test_networks_without_shortcuts_are_refused() -> None:
    with pytest.raises(ConfigError, match="defense=ssft: the network has 0 residual blocks"):
        blocks(vgg19_bn(classes=10, channels=3, image_size=32), method="ssft", least=1)
