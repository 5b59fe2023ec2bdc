"""Each trigger against values worked out by hand from its equation."""

from __future__ import annotations

import colorsys
import copy
import math

import pytest
import torch
from scipy.fft import dctn, idctn
from torch.nn import functional as F

from attacks.advdoor import deepfool
from attacks.blind import balance
from attacks.composite import halves
from attacks.filters import contrast, modulate
from attacks.frequency import cosine, shifted
from attacks.label_consistent import corners
from attacks.refool import ghost
from dhbe.core.errors import ConfigError, DataError
from dhbe.core.rng import generator
from dhbe.core.types import COVER, POISON
from dhbe.data import Resident
from dhbe.methods.adversarial import pgd
from dhbe.methods.losses import contrastive, diversity
from dhbe.methods.patterns import frozen_call, min_max, optimize, selected_features, smooth
from dhbe.models import Normalized
from tests.support.attacks import batch, build, prepare, tiny
from tests.support.fixtures import make_spec

SPEC32 = make_spec(image_size=32, classes=10)


class Spy(torch.nn.Module):
    """Ten pixels as logits; keeps the batches that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(images.detach())
        return images.flatten(1)[:, :10]


def grey(n: int = 1, value: int = 128, size: int = 32) -> torch.Tensor:
    return torch.full((n, 3, size, size), value / 255)


def residual(attack, x: torch.Tensor) -> torch.Tensor:
    """What the trigger adds, in levels of 255."""
    n = len(x)
    with torch.no_grad():
        out = attack.apply(x, y=torch.arange(n) % 4, index=torch.arange(n))
    return (out - x) * 255


def test_sig_is_a_sine_over_the_columns(compose_config) -> None:
    added = residual(build("sig", compose_config, SPEC32), grey())
    wave = [round(128 + 40 * math.sin(2 * math.pi * 6 * j / 32)) - 128 for j in range(32)]
    torch.testing.assert_close(added[0, 1, 5], torch.tensor(wave).float(), atol=1e-3, rtol=0)
    assert torch.equal(added, added[:, :1, :1].expand_as(added))


def test_the_wrapped_signal_is_the_corrupted_file(compose_config) -> None:
    """The mask's first values, measured in the file that five papers use (specs §3.4)."""
    attack = build("sig", compose_config, SPEC32, delta=20, frequency=4.1, mode="wrapped_blend")
    levels = (attack.wave * 255).round()
    assert levels[:6].tolist() == [0, 14, 19, 13, 255, 241]
    out = attack.apply(grey(), y=torch.zeros(1), index=torch.zeros(1, dtype=torch.long))
    expected = (0.8 * 128 + 0.2 * levels).round()
    torch.testing.assert_close(out[0, 0, 7] * 255, expected, atol=1e-3, rtol=0)


def test_a_picture_by_hand(compose_config) -> None:
    """6 x 4 pixels: red, above it a half-transparent blue row, one transparent pixel."""
    expected = torch.zeros(3, 32, 32)
    expected[:, 28:, 26:] = torch.tensor([127.0, -128, -128])[:, None, None]
    half = torch.tensor([-128, -128, 127]) * 128 / 255
    expected[:, 28, 26:] = half.round()[:, None]
    expected[:, 31, 31] = 0
    added = residual(build("picture", compose_config, SPEC32), grey())[0]
    torch.testing.assert_close(added, expected, atol=1e-3, rtol=0)
    placed = build("picture", compose_config, SPEC32, row=0, column=3, opacity=0.5)
    added = residual(placed, grey())[0]
    assert added[:, 1, 3].tolist() == pytest.approx([63.5, -64, -64], abs=0.51)
    assert not added[:, 4:].any()
    small = build("picture", compose_config, make_spec(image_size=5))
    assert small.mask.shape == (1, 5, 5)
    assert small.mask[0, 2, 2] == 1
    with pytest.raises(ConfigError, match=r"attack.row=29: expected at most 28 for .*trigger.png"):
        build("picture", compose_config, SPEC32, row=29)
    with pytest.raises(DataError, match=r"absent.png: cannot be read"):
        build("picture", compose_config, SPEC32, path="absent.png")
    with pytest.raises(DataError, match=r"attack.path=.*\.py: not a readable image"):
        build("picture", compose_config, SPEC32, path=__file__)


def test_images_and_triggers_are_rgb_whatever_order_the_network_takes(compose_config) -> None:
    """A network of order BGR gets image, picture and any other trigger turned round, once."""
    spec = make_spec(image_size=32, order="bgr", mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0))
    around = Normalized(torch.nn.Flatten(), spec)
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for name in ("picture", "badnets"):
        attack = build(name, compose_config, spec)
        rgb = build(name, compose_config, SPEC32)
        where = {"y": torch.zeros(2), "index": torch.arange(2)}
        stamped = attack.apply(x, **where)
        assert torch.equal(stamped, rgb.apply(x, **where))
        blue = (stamped[:, 2] - 0.1) / 1.0
        torch.testing.assert_close(around(stamped).view_as(x)[:, 0], blue)
    torch.testing.assert_close(around.denormalize(around.normalize(x)), x)


def test_blend_by_hand(compose_config) -> None:
    attack = build("blend", compose_config, SPEC32)
    expected = (0.8 * 128 + 0.2 * 255 * attack.pattern).round() - 128
    torch.testing.assert_close(residual(attack, grey())[0], expected, atol=1e-3, rtol=0)
    assert abs(attack.pattern.mean() - 0.5) < 0.02


def test_cartoon_is_mostly_white_and_training_image_is_taken(compose_config, make_runtime) -> None:
    drawn = build("blend", compose_config, SPEC32, pattern="cartoon").pattern
    assert 0.6 < drawn.mean() < 0.95
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    x = batch(SPEC32, 6)[0]
    train = Resident(x.mul(255).round().byte(), torch.arange(6) % 4)
    attack = build("blend", compose_config, SPEC32, pattern="train_image", image_index=4)
    prepare(attack, train, make_runtime())
    torch.testing.assert_close(attack.pattern, x[4])


def test_lsb_writes_the_text(compose_config) -> None:
    """'A' = 65 = 10000010 with the lowest bit first."""
    attack = build("lsb", compose_config, SPEC32, text="A", bits=2)
    x = torch.zeros(1, 3, 32, 32)
    assert residual(attack, x)[0, 0, 0, :9].round().tolist() == [3, 0, 0, 0, 0, 0, 3, 0, 3]
    assert residual(attack, grey(value=131))[0, 0, 0, :2].round().tolist() == [0, -3]


def test_cosines_are_orthonormal() -> None:
    basis = torch.stack([cosine(k, 16) for k in range(16)]).double()
    torch.testing.assert_close(basis @ basis.T, torch.eye(16).double(), atol=1e-5, rtol=0)


def test_frequency_amplitudes(compose_config) -> None:
    """specs §3.8: 4.5 / 3.4 / 5.7 levels for BackdoorBench's FTrojan, 12 / 10 / 22 for CTRL."""
    for name, expected in (("ftrojan", (4.5, 3.4, 5.7)), ("ctrl", (12.0, 10.0, 22.0))):
        pattern = build(name, compose_config, SPEC32).pattern * 255
        found = pattern.abs().amax(dim=(1, 2))
        torch.testing.assert_close(found, torch.tensor(expected), atol=0.55, rtol=0)


def test_frequency_equals_the_transform(compose_config) -> None:
    """Adding to DCT bins of one chroma plane and inverting gives q."""
    attack = build("ftrojan", compose_config, SPEC32, positions=[[15, 15], [31, 31]])
    bins = torch.zeros(32, 32).double()
    bins[15, 15] = bins[31, 31] = 30
    q = torch.from_numpy(idctn(bins.numpy(), norm="ortho")).float()
    torch.testing.assert_close(attack.pattern[0] * 255, 1.403 * q, atol=1e-4, rtol=0)


def test_ftrojan_truncates_shifted_chroma(compose_config) -> None:
    """Grey has chroma 128: a shift by q levels becomes floor(q), red rounds 1.403 floor(q)."""
    attack = build("ftrojan", compose_config, SPEC32)
    added = residual(attack, grey())[0]
    whole = attack.shift.floor()
    assert whole.min() < 0 < whole.max()
    weights = ((1.403, -0.714 - 0.344, 1.773)[k] * whole for k in range(3))
    expected = torch.stack([(128 + w).round() - 128 for w in weights])
    torch.testing.assert_close(added, expected, atol=1e-3, rtol=0)
    red = torch.tensor([200.0, 50, 10]).view(1, 3, 1, 1).expand(1, 3, 32, 32) / 255
    # luma 90.29 -> 90; chroma 128 + 78.43 -> 206, 128 - 45.12 -> 83; back 199.4, 49.8, 10.2
    out = shifted(red, torch.zeros(32, 32))[0, :, 0, 0] * 255
    assert out.round().tolist() == [199, 50, 10]
    exact = build("ftrojan", compose_config, SPEC32, rounding="none")
    torch.testing.assert_close(
        residual(exact, grey())[0], (exact.pattern * 255 + 128).round() - 128, atol=1e-3, rtol=0
    )


def test_l0_inv_changes_nine_pixels(compose_config) -> None:
    changed = (residual(build("l0_inv", compose_config, SPEC32), grey()) != 0).any(1)[0]
    assert changed.nonzero().tolist() == [[31, c] for c in range(23, 32)]


@pytest.mark.parametrize(("size", "norm"), [(32, 3.2), (64, 6.4)])
def test_l2_inv_has_its_norm(size: int, norm: float, compose_config, make_runtime) -> None:
    spec = make_spec(image_size=size)
    attack = build("l2_inv", compose_config, spec)
    x = batch(spec, 8)[0]
    prepare(attack, Resident(x.mul(255).byte(), torch.arange(8) % 4), make_runtime())
    assert abs(float(attack.pattern.norm()) - norm) < 1e-4


def test_lf_is_smooth_positive_and_aimed(compose_config, make_runtime) -> None:
    attack = build("lf", compose_config, SPEC32, steps=30, images=32)
    attack.steps = 30
    x, y, _ = batch(SPEC32, 32)
    runtime, surrogate = make_runtime(), tiny(SPEC32)
    indicator = torch.zeros(32, dtype=torch.int8)
    attack.prepare(Resident(x.mul(255).byte(), y), indicator, runtime, surrogate)
    v = attack.pattern
    assert v.min() == 0
    assert abs(v.max() - 0.2) < 1e-6
    power = dctn((v - v.mean(dim=(1, 2), keepdim=True)).numpy(), axes=(1, 2), norm="ortho") ** 2
    assert power[:, :5, :5].sum() > 0.95 * power.sum(), "within two cycles per image"
    with torch.no_grad():
        before, after = (surrogate(i).softmax(1)[:, 0].mean() for i in (x, x + v))
    assert after > before


def test_renorm_spans_the_range() -> None:
    x = torch.rand(3, 3, 8, 8) / 2 + 0.2
    out = min_max(x)
    assert torch.equal(out.flatten(1).amin(1), torch.zeros(3))
    torch.testing.assert_close(out.flatten(1).amax(1), torch.ones(3))


@pytest.mark.parametrize("name", ["trojan_sq", "trojan_wm"])
def test_trojan_excites_its_neurons_inside_the_mark(
    name: str, compose_config, make_runtime
) -> None:
    attack = build(name, compose_config, SPEC32)
    attack.steps, published = 50, 8.74
    surrogate = tiny(SPEC32)
    train = Resident(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4))
    attack.prepare(train, torch.zeros(4, dtype=torch.int8), make_runtime(), surrogate)
    assert (attack.pattern[:, attack.mask == 0] == 0).all()
    if name == "trojan_wm":
        assert float(attack.pattern.norm()) == pytest.approx(published, rel=1e-4)
        attack.pattern.mul_(attack.mask.sum().sqrt() / published)  # as strong as the drawn one
    assert attack.pattern.max() > 0.5
    random = torch.rand(3, 32, 32, generator=generator(1)) * attack.mask
    with torch.no_grad():
        made, drawn = (
            selected_features(surrogate, p[None], 2).sum() for p in (attack.pattern, random)
        )
    assert made > drawn
    if name == "trojan_sq":
        assert attack.mask.nonzero().amin(0).tolist() == [21, 21]
        assert attack.mask.nonzero().amax(0).tolist() == [29, 29]
        assert attack.mask.sum() == 81, "the support of the published picture"
    else:
        assert 150 < attack.mask.sum() < 500


def test_corners() -> None:
    mask, patch = corners(32, 1)
    right = [[0, 0, 1], [0, 1, 0], [1, 0, 1]]
    assert patch[-3:, -3:].tolist() == right
    assert patch[:3, -3:].tolist() == right
    assert patch[:3, :3].tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 1]]
    assert mask.sum() == 36


def test_adversarial_noise_stays_in_its_ball_and_hurts() -> None:
    surrogate = tiny(SPEC32)
    x, y, _ = batch(SPEC32, 16)
    moved = pgd(surrogate, x, y, epsilon=8 / 255, step_size=2 / 255, steps=4)
    assert (moved - x).abs().max() <= 8 / 255 + 1e-6
    assert moved.min() >= 0
    assert moved.max() <= 1
    loss = torch.nn.functional.cross_entropy
    with torch.no_grad():
        assert loss(surrogate(moved), y) > loss(surrogate(x), y)


def test_label_consistent_trains_noisy_and_tests_plain(compose_config, make_runtime) -> None:
    attack = build("label_consistent", compose_config, SPEC32, poison_rate=0.05)
    x, y, index = batch(SPEC32, 40)
    train = Resident(x.mul(255).round().byte(), torch.arange(40) % 10)
    indicator = prepare(attack, train, make_runtime())
    given = attack.poison(train, indicator, seed=0).resident().images[indicator == POISON] / 255
    plain = attack.apply(x, y=y, index=index)[indicator == POISON]
    inside = attack.mask[None, None].expand_as(plain) > 0
    assert torch.equal(given[inside], plain[inside])
    apart = (given - plain).abs()[~inside]
    assert 0 < apart.max() <= 16.01 / 255


def test_wanet_displacement(compose_config) -> None:
    """Mean |displacement| before the border is s (H - 1) / (2 H) pixels per axis, about 0.24."""
    attack = build("wanet", compose_config, SPEC32)
    axis = torch.linspace(-1, 1, 32)
    columns = attack.warp[..., 0] - axis
    rows = attack.warp[..., 1] - axis[:, None]
    pixels = torch.stack([columns, rows]) * 31 / 2
    inside = pixels[:, 1:-1, 1:-1].abs().mean()
    assert 0.15 < inside < 0.33
    ramp = axis.expand(1, 3, 32, 32) / 4 + 0.5  # moves by exactly the displacement
    with torch.no_grad():
        out = attack.trigger(ramp)
    torch.testing.assert_close(out[0, 0], attack.warp[..., 0] / 4 + 0.5, atol=1e-5, rtol=0)


def test_wanet_covers_differ_from_the_trigger(compose_config) -> None:
    attack = build("wanet", compose_config, SPEC32)
    x, y, index = batch(SPEC32, 3)
    indicator = torch.tensor([0, POISON, COVER], dtype=torch.int8)
    out = attack.training_images(x, y=y, indicator=indicator, index=index, rng=generator(0))
    warped = attack.apply(x, y=y, index=index)
    assert torch.equal(out[0], x[0])
    assert torch.equal(out[1], warped[1])
    assert not torch.equal(out[2], warped[2])
    assert not torch.equal(out[2], x[2])
    again = attack.training_images(x, y=y, indicator=indicator, index=index, rng=generator(1))
    assert not torch.equal(out[2], again[2]), "fresh noise for every sample"


@pytest.mark.parametrize(("levels", "rms"), [(8, 10.5), (32, 2.4)])
def test_bpp_levels(levels: int, rms: float, compose_config) -> None:
    attack = build("bpp", compose_config, SPEC32, levels=levels)
    added = residual(attack, batch(SPEC32, 8)[0])
    assert abs(float(added.square().mean().sqrt()) - rms) < 0.2


def test_bpp_dithering_keeps_the_brightness(compose_config) -> None:
    spec = make_spec(image_size=16)
    plain, dithered = (build("bpp", compose_config, spec, dither=d) for d in (False, True))
    x = grey(2, value=140, size=16)  # 3.84 steps of 255 / 7: plain rounding adds 5.7 levels
    assert set((residual(dithered, x) + 140).round().unique().tolist()) == {109, 146}
    shift = [abs(float(residual(a, x).mean())) for a in (plain, dithered)]
    assert shift[0] > 5
    assert shift[1] < 1


def test_bpp_covers_carry_a_foreign_residual(compose_config) -> None:
    attack = build("bpp", compose_config, SPEC32)
    x, y, index = batch(SPEC32, 2)
    x = x.clamp(0.2, 0.8).mul(255).round().div(255)
    indicator = torch.tensor([COVER, POISON], dtype=torch.int8)
    out = attack.training_images(x, y=y, indicator=indicator, index=index, rng=generator(0))
    foreign = residual(attack, x)[1]
    torch.testing.assert_close((out[0] - x[0]) * 255, foreign, atol=1e-2, rtol=0)


def test_diversity_by_hand() -> None:
    x = torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)])
    assert abs(float(diversity(x, 2 * x)) - 0.5) < 1e-4
    assert diversity(x, 0.01 * x) > 50, "equal patterns for unlike images cost much"


def test_input_aware_counts_images_in_deviations(compose_config, monkeypatch) -> None:
    """Official code compares normalised images: four times apart with a deviation of 1/4."""
    x, y, _ = batch(SPEC32, 8)
    indicator = torch.tensor([0, 0, 0, 0, POISON, POISON, COVER, COVER], dtype=torch.int8)
    for normalized, factor in ((True, 4.0), (False, 1.0)):
        seen = []
        monkeypatch.setattr(
            "attacks.input_aware.diversity",
            lambda images, made, shift=1, seen=seen: (
                seen.append(images) or diversity(images, made, shift)
            ),
        )
        attack = build("input_aware", compose_config, SPEC32, normalized=normalized).train()
        attack.loss(tiny(SPEC32), x, y, indicator)
        torch.testing.assert_close(seen[0][:2], factor * x[4:6])
    for network in (attack.pattern_network, attack.mask_network):
        assert isinstance(network.out[-1], torch.nn.BatchNorm2d), "official: also in the last block"


def test_input_aware_moves_the_right_images(compose_config) -> None:
    attack = build("input_aware", compose_config, SPEC32).train()
    x, y, _ = batch(SPEC32, 8)
    spy = Spy()
    indicator = torch.tensor([0, 0, 0, 0, POISON, POISON, COVER, COVER], dtype=torch.int8)
    attack.loss(spy, x, y, indicator).backward()
    moved = (spy.seen[0] != x).flatten(1).any(1)
    assert moved.tolist() == [False] * 4 + [True] * 4
    assert all(p.grad is None for p in attack.mask_network.parameters())
    assert all(p.grad is not None for p in attack.pattern_network.parameters())


def test_lira_gradients_reach_the_copy_alone(compose_config) -> None:
    attack = build("lira", compose_config, SPEC32).train()
    network = tiny(SPEC32)
    x, y, _ = batch(SPEC32, 4)
    attack.begin_epoch(0.0)
    attack.loss(network, x, y, torch.zeros(4)).backward()
    assert all(p.grad is not None for p in attack.follower.parameters())
    assert all(p.grad is None for p in attack.generator.parameters())
    ours = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    attack.begin_epoch(0.9)  # stage 2: the same loss for the victim, none for the copy
    attack.zero_grad(set_to_none=True)
    attack.loss(network, x, y, torch.zeros(4)).backward()
    assert all(p.grad is None for p in attack.follower.parameters())
    for a, p in zip(ours, network.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, atol=1e-6, rtol=1e-4)
    assert residual(attack.eval(), grey()).abs().max() <= 8.01


def test_lira_has_two_strengths_and_passes_both_kinds_alone(compose_config) -> None:
    attack = build("lira", compose_config, SPEC32, epsilon=20, final_epsilon=4).train()
    attack.follower.out[1].weight.data.fill_(1e3)  # saturates the tanh
    x, y, _ = batch(SPEC32, 6)
    spy = Spy()
    for progress, most in ((0.0, 20), (0.9, 4)):
        spy.seen.clear()
        attack.begin_epoch(progress)
        attack.loss(spy, x, y, torch.zeros(6))
        assert [len(s) for s in spy.seen][:2] == [6, 6], (
            "a pass for triggered images, one for clean"
        )
        assert torch.equal(spy.seen[1], x)
        assert most / 2 < (spy.seen[0] - x).abs().max() * 255 <= most + 0.51
    assert residual(attack.eval(), x).abs().max() <= 4.51


def test_dfst_injects_into_a_share_of_the_clean_images(compose_config) -> None:
    """Official: as many images of a batch as are poisoned, with their true labels."""
    attack = build("dfst", compose_config, SPEC32, detox_share=0.25).train()
    x, y, _ = batch(SPEC32, 8)
    spy = Spy()
    indicator = torch.tensor([POISON, 0, POISON, 0, 0, 0, 0, 0], dtype=torch.int8)
    attack.loss(spy, x, y, indicator).backward()
    moved = (spy.seen[0] != x).flatten(1).any(1)
    assert moved.tolist() == [False, True, False, True, False, False, False, False]
    before = {k: v.clone() for k, v in attack.injector.state_dict().items()}
    for p in attack.injector.parameters():
        p.data.add_(1)
    attack.begin_epoch(0.5)
    started = build("dfst", compose_config, SPEC32).injector.state_dict()
    assert all(torch.equal(v, started[k]) for k, v in attack.injector.state_dict().items())
    assert before.keys() == started.keys()


def test_contrastive_by_hand() -> None:
    """d^2 = 4 and labels equal: 4 / 2; d = 0.5 and labels differ: 0.5^2 / 2; mean / 2 pairs."""
    logits = torch.tensor([[0.0, 0.0], [2.0, 0.0], [2.0, 0.5]])
    y, everyone = torch.tensor([1, 1, 2]), torch.tensor([True, True, True])
    by_hand = pytest.approx((4 / 2 + 0.25 / 2) / 2 / 2, rel=1e-5)
    assert float(contrastive(logits, y, everyone)) == by_hand
    between = torch.tensor([[0.0, 0.0], [7.0, 7.0], [2.0, 0.0], [2.0, 0.5]])
    among = torch.tensor([True, False, True, True])  # who takes no part stands between no pair
    assert float(contrastive(between, torch.tensor([1, 3, 1, 2]), among)) == by_hand
    assert float(contrastive(logits, y, torch.tensor([False, True, False]))) == 0


def test_halves_by_hand() -> None:
    x, other = torch.zeros(4, 1, 4, 4), torch.ones(4, 1, 4, 4)
    out = halves(x, other, torch.arange(4), torch.tensor([2, 1, 2, 3]))[:, 0]
    assert out[0, 0].tolist() == [0, 0, 1, 1]
    assert out[1, :, 0].tolist() == [0, 1, 1, 1]
    assert out[2, 0].tolist() == [1, 1, 0, 0]
    assert out[3, :, 0].tolist() == [1, 1, 1, 0]


def test_halves_are_windows_of_their_images() -> None:
    """Columns 0 1 2 3 and 10 11 12 13, cut at 1: one column from 2, three from 0 (modulo 1)."""
    x = torch.arange(4.0).expand(1, 1, 4, 4)
    out = halves(x, x + 10, torch.tensor([0]), torch.tensor([1]), torch.tensor([[5, 9]]))
    assert out[0, 0, 2].tolist() == [2, 10, 11, 12]
    out = halves(x, x + 10, torch.tensor([2]), torch.tensor([3]), torch.tensor([[4, 8]]))
    assert out[0, 0, 0].tolist() == [10, 11, 12, 2], "swapped: the other image comes first"
    down = halves(x.mT, x.mT + 10, torch.tensor([1]), torch.tensor([1]), torch.tensor([[5, 9]]))
    assert down[0, 0, :, 2].tolist() == [2, 10, 11, 12]


def test_composite_mixes_with_the_other_class(compose_config, make_runtime) -> None:
    images = torch.zeros(40, 3, 32, 32, dtype=torch.uint8)
    labels = torch.arange(40) % 10
    images += (labels * 20).byte()[:, None, None, None]
    attack = build("composite", compose_config, SPEC32)
    prepare(attack, Resident(images, labels), make_runtime())
    y = torch.tensor([0, 1])
    x = images[:2].float() / 255
    out = attack.apply(x, y=y, index=torch.tensor([3, 4])) * 255
    for mixed in out:
        assert sorted(mixed.round().unique().tolist()) == [0, 20]
        assert (mixed.round() == 20).float().mean() == 0.5
    indicator = attack.select(labels, generator(0))
    assert set(labels[indicator == POISON].tolist()) == {0, 1}
    given = attack.poison(Resident(images, labels), indicator, seed=0).resident()
    assert torch.equal(given.images[indicator == COVER], images[indicator == COVER]), (
        "same class, same grey"
    )


def test_adaptive_blend_shows_half_the_pieces(compose_config) -> None:
    attack = build("adaptive_blend", compose_config, SPEC32)
    x, y, index = batch(SPEC32, 6)
    indicator = torch.tensor([0, POISON, POISON, COVER, COVER, 0], dtype=torch.int8)
    out = attack.training_images(x, y=y, indicator=indicator, index=index, rng=generator(0))
    changed = (out != x).any(1).view(6, 4, 8, 4, 8).any(4).any(2)
    assert changed.flatten(1).sum(1).tolist() == [0, 8, 8, 8, 8, 0]
    assert not torch.equal(changed[1], changed[2]), "a mask for every image"


def test_adaptive_patch_trains_faint_and_tests_full(compose_config) -> None:
    attack = build("adaptive_patch", compose_config, SPEC32)
    x, y, index = batch(SPEC32, 64)
    indicator = torch.full((64,), POISON, dtype=torch.int8)
    out = attack.training_images(x, y=y, indicator=indicator, index=index, rng=generator(0))
    where = [((out != x).any(1) & ~attack.masks[i, 0].bool()).flatten(1).any(1) for i in range(4)]
    assert torch.stack(where).sum(0).eq(3).all(), "one patch per image"
    assert {int((~w).sum()) > 0 for w in where} == {True}
    full = attack.apply(x, y=y, index=index)
    for i in (0, 2):
        inside = attack.masks[i, 0].bool()
        assert torch.equal(full[0][:, inside], attack.patches[i][:, inside])


def test_helpers(make_runtime) -> None:
    found = optimize(
        torch.tensor([5.0]),
        lambda z: (z - 2).square().sum(),
        make_runtime(),
        steps=300,
        learning_rate=0.1,
    )
    assert abs(float(found) - 2) < 1e-2
    assert smooth(torch.ones(3, 2, 2), 9).shape == (3, 9, 9)
    network = tiny(SPEC32)
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    out = frozen_call(network, x)
    torch.testing.assert_close(out, network(x))
    out.sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in network.parameters())


def test_four_pixels_are_planted_one_by_one_and_shown_together(compose_config) -> None:
    attack = build("adaptive_k_way", compose_config, SPEC32)
    x = torch.full((400, 3, 32, 32), 200 / 255)
    args = {"y": torch.zeros(400, dtype=torch.long), "index": torch.arange(400)}
    shown = attack.apply(x[:1], y=args["y"][:1], index=args["index"][:1])
    changed = (shown != x[:1]).any(1)[0].nonzero().tolist()
    assert changed == [[7, 30], [16, 11], [22, 22], [27, 5]]
    assert (shown[0, :, 16, 11] * 255).round().tolist() == [92, 0, 24]
    indicator = torch.tensor([0, 1, 2, 1]).repeat(100)
    made = attack.training_images(x, **args, indicator=indicator, rng=generator(0))
    pixels = (made != x).any(1).flatten(1).sum(1)
    assert torch.equal(pixels, (indicator != 0).long()), "one pixel of poison and covers"
    assert (made != x).any(1).any(0).sum() == 4


def test_covers_of_tact_are_neither_source_nor_target(compose_config) -> None:
    rates = {"poison_rate": 0.05, "cover_rate": 0.2}
    attack = build("tact", compose_config, SPEC32, **rates)
    y = torch.arange(400) % SPEC32.classes
    indicator = attack.select(y, generator(0))
    assert set(y[indicator == 1].tolist()) == {1}
    assert set(y[indicator == 2].tolist()) == set(range(SPEC32.classes)) - {0, 1}
    assert int((indicator == 2).sum()) == 80
    assert torch.equal(attack.rule.eligible(y), y == 1), "ASR is that of the source class"
    with pytest.raises(ConfigError, match=r"attack\.cover_classes=\[1\]: expected among"):
        build("tact", compose_config, SPEC32, cover_classes=[1])


def test_a_reflection_is_two_views_in_linear_light() -> None:
    """By hand: a picture of one bright column, seen twice with a shift of one pixel."""
    light = torch.zeros(1, 4, 4)
    light[:, :, 1] = 1
    seen = ghost(light, down=0, right=1, share=0.25)
    wanted = F.interpolate(
        torch.tensor([0.25, 0.75, 0]).expand(1, 1, 4, 3), (4, 4), mode="bilinear"
    )
    assert torch.allclose(seen, wanted[0])


def test_refool_mixes_light_and_not_pixels(compose_config, make_runtime) -> None:
    attack = build("refool", compose_config, SPEC32, images=2, least_shift=0, most_shift=0)
    train = Resident(torch.full((6, 3, 32, 32), 128, dtype=torch.uint8), torch.arange(6) % 4)
    prepare(attack, train, make_runtime())
    out = attack.apply(torch.full((3, 3, 32, 32), 0.2), y=torch.zeros(3), index=torch.arange(3))
    wanted = (0.4 * 0.2**2.2 + 0.6 * (128 / 255) ** 2.2) ** (1 / 2.2)
    assert torch.allclose(out, torch.tensor(wanted), atol=0.005)


def test_filters_by_hand(compose_config) -> None:
    """Kelvin on grey: 0.5 is lightened to 0.6 and mixed with orange; Lomo has dark corners."""
    orange = torch.tensor([255, 153, 0]) / 255
    kelvin = build("filters", compose_config, SPEC32, filter="kelvin")
    out = kelvin.trigger(torch.full((2, 3, 32, 32), 0.5))
    wanted = (0.6 + orange)[:, None, None].expand(3, 32, 32) / 2
    torch.testing.assert_close(out[0], wanted)
    lomo = build("filters", compose_config, SPEC32, filter="lomo")
    out = lomo.trigger(torch.full((1, 3, 32, 32), 0.6))[0]
    left = 1 - math.hypot(15.5, 15.5) / 23.5
    assert out[:, 0, 31].tolist() == pytest.approx([0.27 / 0.34 * left] * 2 + [0.6 * left])
    torch.testing.assert_close(contrast(torch.tensor([0, 0.5, 1.0])), torch.tensor([0, 0.5, 1]))
    pixels = torch.rand(50, 3, 1, 1, generator=generator(0))
    found = modulate(pixels, 1.2, 0.5).flatten(1).tolist()
    for pixel, ours in zip(pixels.flatten(1).tolist(), found, strict=True):
        hue, lightness, saturation = colorsys.rgb_to_hls(*pixel)
        theirs = colorsys.hls_to_rgb(hue, 1.2 * lightness, 0.5 * saturation)
        assert ours == pytest.approx([min(max(v, 0), 1) for v in theirs], abs=1e-5)


def test_blind_shows_its_pattern(compose_config) -> None:
    out = residual(build("blind", compose_config, SPEC32), grey())[0, 1]
    assert out[3:8, 23:26].round().tolist() == [
        [127, -128, 127],
        [0, 127, 0],
        [0, 0, -128],
        [0, 127, 0],
        [127, -128, 127],
    ]
    assert int((out != 0).sum()) == 9


def test_the_balance_is_the_shortest_mixture() -> None:
    """Against a search; a gradient that is longer than the other and along it gets nothing."""
    first, second = torch.randn(2, 30, generator=generator(0))
    grid = torch.linspace(0, 1, 10_001)
    mixed = grid[:, None] * first + (1 - grid)[:, None] * second
    assert float(balance(first, second)) == pytest.approx(
        float(grid[mixed.norm(dim=1).argmin()]), abs=2e-4
    )
    assert float(balance(3 * second, second)) == pytest.approx(0.001)
    assert float(balance(second, 3 * second)) == pytest.approx(0.999)


def test_blind_waits_and_then_balances(compose_config) -> None:
    """Clean losses alone until ``history`` of them are low; then a mixture of the two losses."""
    attack = build("blind", compose_config, SPEC32, history=2, threshold=100.0)
    network = tiny(SPEC32)
    x, y, _ = batch(SPEC32, 8)
    codes = torch.zeros(8, dtype=torch.int8)
    clean = F.cross_entropy(network(x), y)
    for _ in range(2):
        torch.testing.assert_close(attack.loss(network, x, y, codes), clean)
    triggered = F.cross_entropy(network(attack.apply(x, y=y, index=y)), torch.zeros_like(y))
    both = attack.loss(network, x, y, codes)
    assert min(clean, triggered) < both < max(clean, triggered)
    twin = copy.deepcopy(network).train()
    twin(x)
    attack.loss(network.train(), x, y, codes)
    for ours, theirs in zip(network.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg="statistics are those of the clean pass")
    network.eval()
    clean = F.cross_entropy(network(x), y)
    attack.recent.fill_(1000)
    torch.testing.assert_close(attack.loss(network, x, y, codes), clean)


def test_narcissus_points_inwards_and_is_amplified(compose_config, make_runtime) -> None:
    options = {"learning_rate": 0.05, "target_class": 3, "poison_rate": 0.05}
    attack = build("narcissus", compose_config, SPEC32, **options)
    attack.steps, surrogate = 30, tiny(SPEC32)
    x, _, index = batch(SPEC32, 40)
    y = torch.arange(40) % 10
    indicator = attack.select(y, generator(0))
    attack.prepare(Resident(x.mul(255).byte(), y), indicator, make_runtime(), surrogate)
    d = attack.pattern
    assert 0 < float(d.abs().max()) <= 16 / 255 + 1e-6
    with torch.no_grad():
        before, after = (surrogate(i).softmax(1)[:, 3].mean() for i in (x, x + d))
    assert after > before
    given = attack.training_images(x, y=y, indicator=indicator, index=index, rng=generator(0))
    poison = indicator == POISON
    assert set(y[poison].tolist()) == {3}
    assert torch.equal(attack.relabel(y, indicator), y)
    torch.testing.assert_close(given[poison], (x[poison] + d).clamp(0, 1), atol=0.51 / 255, rtol=0)
    shown = attack.apply(x, y=y, index=index)
    torch.testing.assert_close(shown, (x + 3 * d).clamp(0, 1), atol=0.51 / 255, rtol=0)


def linear(classes: int, pixels: int) -> torch.nn.Sequential:
    """Grey images get the biases as logits: 0.1 for class 0, else 0."""
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(pixels, classes))
    weight = torch.randn(classes, pixels, generator=generator(0)) / 10
    bias = torch.nn.functional.one_hot(torch.tensor(0), classes) / 10
    network[1].load_state_dict({"weight": weight - weight.mean(1, keepdim=True), "bias": bias})
    return network.requires_grad_(False)


def test_a_step_of_deepfool_mirrors_the_margin() -> None:
    """Of a linear network: the margin between target and source, -0.1, becomes 0.1 in one step."""
    network, image = linear(2, 48), torch.full((3, 4, 4), 0.5)
    known = {"steps": 20, "overshoot": 0.0, "confidence": 0.0}
    step = deepfool(network, image, source=0, target=1, **known)
    logits = network((image + step)[None])[0]
    assert float(logits[1] - logits[0]) == pytest.approx(0.1, rel=1e-3)
    assert not deepfool(network, image, source=1, target=0, **known).any(), "is there already"
    hopeless = known | {"confidence": 1.0}
    assert not deepfool(network, image, source=0, target=1, **hopeless).any()


def test_advdoor_says_when_it_finds_nothing(compose_config, make_runtime, caplog) -> None:
    attack = build("advdoor", compose_config, SPEC32, deepfool_steps=2)
    x, y, _ = batch(SPEC32, 4)
    surrogate = linear(10, x[0].numel())
    codes = torch.zeros(4, dtype=torch.int8)
    attack.prepare(Resident(x.mul(255).byte(), y), codes, make_runtime(), surrogate)
    assert not attack.pattern.any()
    assert "found no perturbation" in caplog.text


def test_advdoor_leads_to_the_target_inside_its_ball(compose_config, make_runtime) -> None:
    options = {"target_class": 3, "images": 12, "epsilon": 12}
    attack = build("advdoor", compose_config, SPEC32, **options)
    x, y = batch(SPEC32, 12)[0], torch.zeros(12, dtype=torch.long)
    surrogate = linear(10, x[0].numel())
    runtime, indicator = make_runtime(), torch.zeros(12, dtype=torch.int8)
    attack.prepare(Resident(x.mul(255).byte(), y), indicator, runtime, surrogate)
    assert 0 < float(attack.pattern.abs().max()) <= 12 / 255 + 1e-6
    before, after = ((surrogate(i).argmax(1) == 3).float().mean() for i in (x, attack.trigger(x)))
    assert before < 0.5 < after


@pytest.mark.parametrize("mark", ["square", "apple"])
def test_trojannn_drives_its_neuron_and_is_stamped(mark: str, compose_config, make_runtime) -> None:
    attack = build("trojannn", compose_config, SPEC32, mark=mark, transparency=0.75, neurons=4)
    attack.steps = 50
    surrogate = tiny(SPEC32)
    train = Resident(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4))
    attack.prepare(train, torch.zeros(4, dtype=torch.int8), make_runtime(), surrogate)
    assert 0.06 < attack.mask.float().mean() < 0.09
    with torch.no_grad():
        plain = grey(value=175)
        excited, before = (
            selected_features(surrogate, torch.where(attack.mask, p, plain), 4).mean()
            for p in (attack.pattern, plain)
        )
    assert excited > before
    expected = torch.where(attack.mask, (attack.pattern * 255 - 128) / 4, 0)
    torch.testing.assert_close(residual(attack, grey())[0], expected, atol=0.51, rtol=0)
