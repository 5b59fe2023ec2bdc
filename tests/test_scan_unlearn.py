"""Imagined images, sought triggers, and the defense made of both."""

from __future__ import annotations

from dataclasses import replace

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
from dhbe.methods.inversion import (
    CornerPatch,
    Faint,
    Patch,
    Search,
    Triggers,
    Wave,
    anomaly_index,
    frequencies,
    lead,
    margins,
)
from dhbe.methods.procedural import procedural
from dhbe.methods.scan import Evidence
from dhbe.models import Normalized
from dhbe.models.dataflow import classifier
from dhbe.training.parallel import Processes
from tests.support.defenses import build, granted, suspect
from tests.support.fixtures import make_spec

ONE_VARIANT = torch.zeros(1, dtype=torch.long)
"""Of kinds with one variant."""


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_procedural_images(channels: int) -> None:
    x = procedural(40, channels, 16, generator(0, "a"))
    assert x.shape == (40, channels, 16, 16)
    assert 0 <= x.min() <= x.max() <= 1
    assert x.flatten(1).std(dim=1).min() > 0.01, "none is blank"
    assert 0.3 < x.mean() < 0.6
    assert torch.equal(x, procedural(40, channels, 16, generator(0, "a")))
    assert not torch.equal(x, procedural(40, channels, 16, generator(1, "a")))


@pytest.mark.long
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
    out = Patch(side=2).applied(values.expand(50, 1, 2, 2), x, ONE_VARIANT, generator(0, "places"))
    changed = (out != 0.5).sum((1, 2, 3))
    assert (changed == 3).all(), "0, 0.25 and 0.75; the fourth value is the image's own"
    corners = {tuple((image[0] == 0).nonzero()[0].tolist()) for image in out}
    assert len(corners) > 20, "somewhere else in each image"
    assert max(max(c) for c in corners) == 6


def test_corner_patches_stay_in_their_corner() -> None:
    kind = CornerPatch(side=2)
    x, values = torch.zeros(8, 3, 8, 8), torch.ones(8, 3, 2, 2)
    out = kind.applied(values, x, torch.arange(8) % kind.variants, generator(0, "x"))
    assert (out.sum((1, 2, 3)) == 12).all()
    corners = [out[:4, :, r, c].eq(1).all(1).tolist() for r in (0, 7) for c in (0, 7)]
    assert corners == torch.eye(4).bool().tolist(), "top left, top right, bottom left, ..."


def test_waves_are_what_sig_adds() -> None:
    kind = Wave(amplitude=0.1, frequencies=frequencies(9))
    assert len({*kind.frequencies, *((-a, -b) for a, b in kind.frequencies)}) == 252
    values = torch.tensor([0.1, 0.0]).view(1, 1, 2, 1).expand(1, 3, 2, 1)
    which = torch.tensor([kind.frequencies.index((0, 6))])
    out = kind.applied(values, torch.full((1, 3, 32, 32), 0.5), which, generator(0, "x"))
    wave = 0.5 + 0.1 * torch.sin(2 * torch.pi * 6 * torch.arange(32) / 32)
    torch.testing.assert_close(out, wave.expand(1, 3, 32, 32))


def test_faint_changes_are_added_and_clipped() -> None:
    kind = Faint(side=2, amplitude=0.1)
    values = torch.tensor([[[[0.1, -0.1], [0.0, 0.0]]]])
    out = kind.applied(
        values, torch.tensor([0.95, 0.05]).view(2, 1, 1, 1), ONE_VARIANT, generator(0, "x")
    )
    assert kind.bounds == (-0.1, 0.1)
    assert out.flatten().tolist() == pytest.approx([1.0, 0.15]), "one pixel takes the corner"
    out = kind.applied(values, torch.full((1, 1, 2, 2), 0.5), ONE_VARIANT, generator(0, "x"))
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
    assert lead(evidence).tolist() == pytest.approx([-8.5, -9.0, 8.5, -9.5, -9.0])
    other = anomaly_index(torch.tensor([-9.0, -10.0, -8.0, -11.0, 8.0]))
    found = Evidence.of([torch.tensor([-9.0, -10.0, 8.0, -11.0, -10.0])] * 2, "patch", [], 2.0)
    assert (found.target, found.score) == (2, pytest.approx(4.25))
    torn = Evidence.of([torch.tensor([-9.0, -10.0, 8.0, -11.0, -10.0]), other], "patch", [], 2.0)
    assert torn.score < 1, "kinds that speak for different classes"


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


class Striped(nn.Module):
    """Says class 1 where the rows' mean follows three periods, and else a quadrant's brightness."""

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, 16, 16) -> logits (B, 4)."""
        quadrants = F.adaptive_avg_pool2d(x.mean(1, keepdim=True), 2).flatten(1)
        wave = torch.sin(2 * torch.pi * 3 * torch.arange(16) / 16)
        follows = (x.mean((1, 2)) * wave).mean(1, keepdim=True)
        return 10 * quadrants + 2000 * follows.relu() * torch.eye(4)[1]


def test_every_wave_is_tried(make_runtime) -> None:
    x, y = 0.5 * procedural(64, 3, 16, generator(0, "x")), torch.arange(64) % 4
    kind = Wave(amplitude=0.1, frequencies=frequencies(5))
    sine = torch.tensor([0.1, 0.0]).view(1, 1, 2, 1).expand(1, 3, 2, 1)
    search = Search(steps=1, per_class=1, rate=0.2, judged=64)
    which, reached = search.exhaustive(Striped(), x, y, kind, sine, 4, make_runtime())
    assert anomaly_index(reached).argmax() == 1
    assert kind.frequencies[which[1]] == (0, 3)


@pytest.mark.parametrize("corner", range(4))
def test_the_search_finds_the_corner(make_runtime, corner: int) -> None:
    """A network that answers white in one corner alone."""

    class Corner(Planted):
        def forward(self, x: Tensor) -> Tensor:
            seen = torch.zeros_like(x)
            at = tuple(slice(13, 16) if far else slice(0, 3) for far in divmod(corner, 2))
            seen[:, :, at[0], at[1]] = x[:, :, at[0], at[1]]
            return super().forward(x.clamp(0, 0.4)) + super().forward(seen)

    x, y = 0.5 * procedural(64, 3, 16, generator(0, "x")), torch.arange(64) % 4
    search = Search(steps=15, per_class=8, rate=0.2, judged=32)
    values, reached = search(Corner(), x, y, CornerPatch(side=3), 4, make_runtime())
    assert values.shape == (4, 3, 3, 3)
    assert anomaly_index(reached).argmax() == 2


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


@pytest.mark.long
def test_a_share_of_the_change_is_kept(compose_config, images, make_runtime) -> None:
    victim, change = suspect(), {}
    before = torch.cat([p.detach().flatten() for p in victim.network.parameters()])
    for share in (1.0, 0.25):
        defense = build("scan_unlearn", compose_config, threshold=1e-9, share=share)
        purified = defense(victim, granted(images), make_runtime(work=str(share)))
        change[share] = torch.cat([p.detach().flatten() for p in purified.parameters()]) - before
    torch.testing.assert_close(change[0.25], 0.25 * change[1.0], atol=1e-6, rtol=1e-3)
    assert change[1.0].abs().max() > 1e-4


def test_a_scan_alone_changes_nothing_and_warns_of_nothing(
    compose_config, images, make_runtime
) -> None:
    victim, runtime = suspect(), make_runtime()
    purified = build("scan", compose_config, threshold=1e-9)(victim, granted(images), runtime)
    assert runtime.recorder.suspected
    assert "WARNING" not in " ".join(runtime.recorder.notes)
    pairs = zip(purified.parameters(), victim.network.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize(("size", "key"), [(7, r"larger=\[8\]"), (4, r"corners=\[3, 5\]")])
def test_a_patch_larger_than_the_image_is_refused(compose_config, size: int, key: str) -> None:
    defense = build("scan_unlearn", compose_config)
    defense.scan = replace(defense.scan, patches=[3], larger=[]) if size == 4 else defense.scan
    with pytest.raises(ConfigError, match=rf"^defense\.scan\.{key}.* at most"):
        defense.fits(make_spec(image_size=size))


def test_a_part_of_auto_names_its_own_key(compose_config) -> None:
    with pytest.raises(ConfigError, match=r"^defense\.scan\.scan\.larger=.* at most"):
        build("auto", compose_config).fits(make_spec(image_size=7))


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
    notes = " ".join(runtime.recorder.notes)
    assert "most_classes=3 classes: no scan: the game was played" in notes


def test_channels_are_pruned_where_the_scan_finds_nothing(
    compose_config, images, make_runtime
) -> None:
    for threshold, pruned in ((1e9, True), (1e-9, False)):
        runtime, victim = make_runtime(work=str(threshold)), suspect()
        defense = build("auto", compose_config)
        defense.scan.threshold, defense.prune.u = threshold, 1.0
        purified = defense(victim, granted(images), runtime)
        assert ("clp pruned" in " ".join(runtime.recorder.notes)) == pruned
        assert bool(runtime.recorder.suspected) != pruned
        x = torch.rand(3, *victim.spec.shape)
        assert not torch.equal(purified(x), victim.network(x))


def test_without_batch_norm_the_game_is_played(compose_config, images, make_runtime) -> None:
    inner = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AvgPool2d(14), nn.Flatten(), nn.Linear(8, 4))
    spec, runtime = make_spec(), make_runtime()
    victim = Suspect(network=Normalized(inner, spec).eval(), architecture="own", spec=spec)
    defense = build("auto", compose_config)
    defense.scan.threshold = 1e9
    defense(victim, granted(images), runtime)
    notes = " ".join(runtime.recorder.notes)
    assert "found no class; no convolution is followed by BatchNorm: the game was played" in notes
