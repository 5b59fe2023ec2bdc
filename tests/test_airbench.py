"""airbench: a first layer that whitens, and Muon's steps against their definition."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dhbe.core.errors import ConfigError
from dhbe.models import Normalized
from dhbe.models.airbench import Airbench
from dhbe.models.normalized import fresh
from dhbe.training.muon import Muon, MuonSchedule, orthogonal
from dhbe.training.schedule import Linear
from tests.support.fixtures import make_spec


def network(**options: int) -> Airbench:
    return Airbench(
        widths=[8, 12, 12], **({"classes": 3, "channels": 3, "image_size": 32} | options)
    )


def schedule(**options: float) -> MuonSchedule:
    known = {
        "epochs": 1,
        "batch_size": 10,
        "learning_rate": 0.24,
        "momentum": 0.6,
        "newton_schulz": 3,
        "bias_rate": 0.05,
        "head_rate": 0.5,
        "other_momentum": 0.85,
        "weight_decay": 2e-6,
        "shape": Linear(),
    }
    return MuonSchedule(**known | options)


def test_patches_come_out_white() -> None:
    """Outputs of the first half of the filters are uncorrelated, of variance 1 but for EPS."""
    built = network()
    images = torch.randn(40, 3, 32, 32) + 0.5 * torch.randn(40, 1, 1, 1)
    built.initialise_from(images)
    with torch.no_grad():
        nn.init.zeros_(built.whiten.bias)
        out = built.whiten(images).transpose(0, 1).flatten(1)
    half = len(out) // 2
    assert torch.allclose(out[:half] @ out[:half].T / out.shape[1], torch.eye(half), atol=0.01)
    assert torch.equal(out[half:], -out[:half])


def test_new_weights_pass_the_inputs_through() -> None:
    first = network().groups[1][0]
    wide = network().groups[2][0]
    x = torch.randn(1, 8, 5, 5)
    assert torch.allclose(wide(x)[:, :8], x, atol=1e-6)
    assert first.weight.shape == (8, 24, 3, 3)


def test_a_defense_may_draw_it_anew() -> None:
    spec = make_spec(classes=3)
    suspect = Normalized(network(), spec)
    with torch.no_grad():
        for p in suspect.parameters():
            p.add_(torch.randn_like(p))
    drawn = fresh(suspect, seed=1, method="ours")
    pairs = zip(drawn.parameters(), suspect.parameters(), strict=True)
    assert not any(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("shape", [(6, 30), (30, 6)])
def test_steps_are_nearly_orthogonal(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonal(matrix, steps=6)
    values = torch.linalg.svdvals(found)
    assert 0.5 < values.min() <= values.max() < 1.5
    turned = left.T @ found @ right.T
    assert torch.allclose(turned, torch.diag(turned.diag()), atol=1e-4)


def test_filters_keep_their_norm_and_the_rest_is_sgd() -> None:
    """Two steps, the second with momentum, against torch's SGD on all but the filters."""
    built, plain = network().double(), network().double()
    plain.load_state_dict(built.state_dict())
    ours, options = schedule().optimizer(built), schedule()
    others = [p for p in plain.parameters() if p.requires_grad and p.ndim < 4]
    groups = [
        {"params": [p for p in others if p.ndim == 1], "lr": 0.5, "weight_decay": 2e-6 / 0.05},
        {"params": [p for p in others if p.ndim == 2], "lr": 5.0, "weight_decay": 2e-6 / 0.5},
    ]
    sgd = torch.optim.SGD(groups, lr=1.0, momentum=0.85, nesterov=True)
    assert options.factor(0.25) == 0.75
    for _ in range(2):
        gradients = [torch.randn_like(p) for p in built.parameters()]
        for both in (built, plain):
            for p, g in zip(both.parameters(), gradients, strict=True):
                p.grad = g.clone() if p.requires_grad else None
        before = [c.weight.clone() for c in built.modules() if isinstance(c, nn.Conv2d)][1:]
        ours.step()
        sgd.step()
        after = [c.weight for c in built.modules() if isinstance(c, nn.Conv2d)][1:]
        for old, new in zip(before, after, strict=True):
            moved = new - old * (len(old) ** 0.5 / old.norm())
            assert 0.1 < torch.linalg.svdvals(moved.flatten(1)).max() / 0.24 < 1.5
    for (name, mine), theirs in zip(built.named_parameters(), plain.parameters(), strict=True):
        if mine.ndim < 4 or "whiten" in name:
            assert torch.allclose(mine, theirs, atol=1e-12), name


def test_a_few_steps_learn_to_tell_images_apart() -> None:
    x = torch.rand(20, 3, 32, 32)
    y = torch.arange(20) % 2
    built = network(classes=2)
    built.initialise_from(x)
    learning: Muon = schedule(batch_size=20).optimizer(built)
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(built(x), y)
        learning.zero_grad()
        loss.backward()
        learning.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_other_weights_are_not_silently_left_untrained() -> None:
    with pytest.raises(ConfigError, match=r"model=weights of \[3\] dimensions"):
        schedule().optimizer(nn.Conv1d(2, 3, 3))
    assert network(image_size=9)(torch.zeros(2, 3, 9, 9)).shape == (2, 3)
