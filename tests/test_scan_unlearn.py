"""Imagined images, sought triggers, and the defense made of both."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dhbe.core.errors import ConfigError
from dhbe.core.rng import generator
from dhbe.core.types import Suspect
from dhbe.data import Budget
from dhbe.game.imagined import Imagination
from dhbe.game.statistics import statistics_gaps
from dhbe.methods.inversion import Faint, Patch, Search, Triggers, anomaly_index, margins
from dhbe.methods.procedural import procedural
from dhbe.models import Normalized
from dhbe.models.dataflow import classifier
from dhbe.training.parallel import Processes
from tests.conftest import make_spec
from tests.support.defenses import build, granted, suspect


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_procedural_images(channels: int) -> None:
    x = procedural(40, channels, 16, generator(0, "a"))
    assert x.shape == (40, channels, 16, 16)
    assert 0 <= x.min() <= x.max() <= 1
    assert x.flatten(1).std(dim=1).min() > 0.01, "none is blank"
    assert 0.3 < x.mean() < 0.6
    assert torch.equal(x, procedural(40, channels, 16, generator(0, "a")))
    assert not torch.equal(x, procedural(40, channels, 16, generator(1, "a")))


def test_imagined_images_are_more_of_the_networks_kind(make_runtime) -> None:
    network, runtime = suspect().network.requires_grad_(False), make_runtime()
    assert isinstance(network, Normalized)
    classifier(network).weight.mul_(20)  # untrained, it hardly tells images apart
    recipe = {"count": 32, "batch_size": 32, "rate": 0.05, "smoothness": 0.1}
    gap, wrong = {}, {}
    for steps, label in ((1, 0.0), (30, 0.0), (30, 10.0)):
        x, y = Imagination(steps=steps, label=label, **recipe).images(network, runtime)
        assert x.shape == (32, 3, 16, 16)
        assert 0 <= x.min() <= x.max() <= 1
        assert y.bincount().tolist() == [8, 8, 8, 8]
        with torch.no_grad(), statistics_gaps(network, Processes()) as gaps:
            wrong[steps, label] = float(F.cross_entropy(network(x), y))
        gap[steps, label] = float(torch.stack(gaps).mean())
    assert gap[30, 0.0] < 0.7 * gap[1, 0.0], "statistics"
    assert wrong[30, 10.0] < 0.7 * wrong[30, 0.0], "classes"


def test_patches_replace_pixels() -> None:
    x = torch.full((50, 1, 8, 8), 0.5)
    values = torch.arange(4.0).view(1, 1, 2, 2) / 4
    out = Patch(side=2).applied(values.expand(50, 1, 2, 2), x, generator(0, "places"))
    changed = (out != 0.5).sum((1, 2, 3))
    assert (changed == 3).all(), "0, 0.25 and 0.75; the fourth value is the image's own"
    corners = {tuple((image[0] == 0).nonzero()[0].tolist()) for image in out}
    assert len(corners) > 20, "somewhere else in each image"
    assert max(max(c) for c in corners) == 6


def test_faint_changes_are_added_and_clipped() -> None:
    kind = Faint(side=2, amplitude=0.1)
    values = torch.tensor([[[[0.1, -0.1], [0.0, 0.0]]]])
    out = kind.applied(values, torch.tensor([0.95, 0.05]).view(2, 1, 1, 1), generator(0, "x"))
    assert kind.bounds == (-0.1, 0.1)
    assert out.flatten().tolist() == pytest.approx([1.0, 0.15]), "one pixel takes the corner"
    out = kind.applied(values, torch.full((1, 1, 2, 2), 0.5), generator(0, "x"))
    assert out.flatten().tolist() == pytest.approx([0.6, 0.4, 0.5, 0.5])


def test_triggers_climb_by_a_share_of_their_range() -> None:
    made = Triggers(Faint(side=2, amplitude=0.5), 1, 1, generator(0, "t"), torch.zeros(1))
    before = made.values.detach().clone()
    (made.values * torch.tensor([[3.0, -0.01], [0.0, 900.0]])).sum().backward()
    made.climb(0.1)
    moved = (made.values - before).flatten().tolist()
    assert moved == pytest.approx([0.1, -0.1, 0.0, 0.1])
    for _ in range(20):
        made.values.sum().backward()
        made.climb(0.1)
    assert made.values.flatten().tolist() == pytest.approx([0.5] * 4), "held in the bounds"


def test_margins_and_evidence() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.0], [3.0, 1.0, 0.0]])
    assert margins(logits, torch.tensor([0, 2])).tolist() == [2.0, -3.0]
    evidence = anomaly_index(torch.tensor([-9.0, -10.0, 8.0, -11.0, -10.0]))
    assert evidence.tolist() == pytest.approx([0.5, 0.0, 9.0, -0.5, 0.0])


class Planted(nn.Module):
    """Says a class by the mean of a quadrant, and class 2 wherever a white 3x3 square is."""

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, 16, 16) -> logits (B, 4)."""
        quadrants = F.adaptive_avg_pool2d(x.mean(1, keepdim=True), 2).flatten(1)
        white = F.avg_pool2d(x.mean(1, keepdim=True), 3, 1).pow(8).amax((1, 2, 3))
        return 10 * quadrants + 40 * white[:, None] * torch.eye(4)[2]


def test_the_search_finds_the_planted_class(make_runtime) -> None:
    x = 0.5 * procedural(64, 3, 16, generator(0, "x"))
    search = Search(steps=15, per_class=8, rate=0.2, judged=32)
    y = torch.arange(64) % 4
    values, reached = search(Planted(), x, y, Patch(side=3), 4, make_runtime())
    evidence = anomaly_index(reached)
    assert evidence.argmax() == 2
    assert evidence[2] > 3.5
    assert values[2].mean() > 0.9, "white"


def test_only_evidence_changes_the_network(compose_config, images, make_runtime) -> None:
    victim = suspect()
    for threshold, changes in ((1e9, False), (1e-9, True)):
        runtime = make_runtime(work=str(threshold))
        defense = build("scan_unlearn", compose_config, threshold=threshold)
        purified = defense(victim, granted(images), runtime)
        assert bool(runtime.recorder.suspected) == changes
        pairs = zip(purified.parameters(), victim.network.parameters(), strict=True)
        assert any(not torch.equal(p, q) for p, q in pairs) == changes
        statistics = zip(purified.buffers(), victim.network.buffers(), strict=True)
        assert all(torch.equal(p, q) for p, q in statistics), "BatchNorm stays frozen"
        assert {"imagined", "triggers_found"} <= set(runtime.recorder.pictures)


def test_a_patch_larger_than_the_image_is_refused(compose_config) -> None:
    with pytest.raises(ConfigError, match=r"defense\.patches=\[3, 20\].* at most"):
        build("scan_unlearn", compose_config, patches=[3, 20]).fits(make_spec())


def test_a_network_without_statistics_is_scanned_too(compose_config, images, make_runtime) -> None:
    inner = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AvgPool2d(14), nn.Flatten(), nn.Linear(8, 4))
    spec = make_spec()
    victim = Suspect(network=Normalized(inner, spec).eval(), architecture="own", spec=spec)
    runtime = make_runtime()
    build("scan_unlearn", compose_config)(victim, granted(images), runtime)
    assert runtime.recorder.suspected is not None


def test_no_budget_is_needed(compose_config) -> None:
    build("scan_unlearn", compose_config).check(Budget(name="none"))


def test_many_classes_are_not_scanned(compose_config, images, make_runtime) -> None:
    runtime = make_runtime()
    build("auto", compose_config, most_classes=3)(suspect(), granted(images), runtime)
    assert runtime.recorder.suspected is None
    assert "most_classes=3 classes, so no scan: the game" in " ".join(runtime.recorder.notes)


def test_the_game_is_played_where_the_scan_finds_nothing(
    compose_config, images, make_runtime
) -> None:
    for threshold, played in ((1e9, True), (1e-9, False)):
        runtime = make_runtime(work=str(threshold))
        defense = build("auto", compose_config)
        defense.scan.threshold = threshold
        victim = suspect()
        purified = defense(victim, granted(images), runtime)
        assert ("the game was played" in " ".join(runtime.recorder.notes)) == played
        buffers = zip(purified.buffers(), victim.network.buffers(), strict=True)
        assert any(not torch.equal(p, q) for p, q in buffers) == played, "the scan freezes them"
