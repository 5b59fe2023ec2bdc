"""Each defense's losses, scores and masks against slow, obvious references; and on a toy victim."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import timm
import torch
from conftest import make_spec
from scipy.optimize import OptimizeResult
from test_attacks import badnets, tiny
from test_defenses import DEFENSES, build, granted, suspect
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.models import VisionTransformer

from defenses.abl import local_ascent
from defenses.anp import ANP
from defenses.awm import AWM
from defenses.fine_pruning import head_accuracy
from defenses.fip import Spectrum, fisher_trace
from defenses.ft_sam import ascent
from defenses.i_bau import implicit
from defenses.nad import attention
from defenses.ngf import conjugate_gradients, fisher_diagonal, fisher_product, gradient
from defenses.ssft import SSFT, critical
from defenses.trap_and_replace import decoder
from defenses.ulrl import reset
from dhbe.checkpoint import CheckpointFile
from dhbe.core.errors import ArtefactError, ConfigError
from dhbe.core.rng import generator
from dhbe.core.types import Suspect
from dhbe.data import Budget, DefenderData, Resident, TrainingBatches, even, to_float
from dhbe.evaluation.evaluator import Evaluator
from dhbe.evaluation.metrics import rates
from dhbe.experiment.contents import save_weights
from dhbe.methods.adversarial import universal
from dhbe.methods.losses import total_variation_squared
from dhbe.methods.masks import attach, batch_norms, clamp, fold, prune
from dhbe.methods.rectangles import Stagnation, rectangles
from dhbe.methods.selection import accuracy, choose
from dhbe.methods.statistics import outliers
from dhbe.methods.unlearning import unlearn
from dhbe.models import Normalized
from dhbe.models.dataflow import classifier
from dhbe.models.hooks import capture, executed_after, frozen_statistics, smooth_cam, stages
from dhbe.models.normalized import fresh
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
from dhbe.training.schedule import Cosine, OneCycle, SGDSchedule
from dhbe.victim.memory import InMemoryVictim
from dhbe.victim.train import train

SPEC = make_spec()


def batch(n: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    rng = generator(3)
    return torch.rand(n, *SPEC.shape, generator=rng), torch.arange(n) % 4


# ---------------------------------------------------------------- shared pieces


def test_masks_scale_and_fold() -> None:
    network = tiny(SPEC)
    x, _ = batch()
    before, plain = network(x), copy.deepcopy(network.state_dict())
    layers = batch_norms(network, method="x")
    scales = attach(layers)
    torch.testing.assert_close(network(x), before)
    scales[0].mask.data[:] = torch.linspace(-1, 2, 16)
    clamp(scales)
    assert scales[0].mask.min() == 0
    assert scales[0].mask.max() == 1
    changed = network(x)
    fold(layers)
    torch.testing.assert_close(network(x), changed)
    assert network.state_dict().keys() == plain.keys()
    expected = plain["network.stem.1.weight"] * torch.linspace(-1, 2, 16).clamp(0, 1)
    torch.testing.assert_close(layers[0].weight, expected)
    attach(layers)[0].mask.data.zero_()
    fold(layers, keep=False)
    torch.testing.assert_close(network(x), changed)


def test_prune_zeroes_gamma_at_or_below_the_threshold() -> None:
    layer = nn.BatchNorm2d(4)
    assert prune([layer], [torch.tensor([0.1, 0.2, 0.3, 0.9])], 0.2) == 2
    assert layer.weight.tolist() == [0, 0, 1, 1]


def test_networks_without_batchnorm_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"defense=anp: the network has no BatchNorm.*use a defense that"
    ):
        batch_norms(nn.Conv2d(1, 1, 1), method="anp")


def test_outliers_by_hand() -> None:
    """Median 3, MAD 1: 10 lies 7 / 1.4826 = 4.7 deviations above."""
    values = np.array([1.0, 2, 3, 4, 10])
    assert outliers(values, 4.5, side="above") == [4]
    assert outliers(values, 4.8, side="above") == []
    assert outliers(-values, 4.5, side="below") == [4]


def test_passes_with_frozen_statistics_leave_them_and_carry_gradients() -> None:
    network = tiny(SPEC).train()
    x, _ = batch()
    before = copy.deepcopy(network.state_dict())
    out = frozen_statistics(network, x)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    torch.testing.assert_close(out, copy.deepcopy(network)(x))
    moved = {k: (p + 0.1).detach().requires_grad_(True) for k, p in network.named_parameters()}
    frozen_statistics(network, x, moved).sum().backward()
    assert all(w.grad is not None for w in moved.values())


@pytest.mark.parametrize(
    ("network", "count"),
    [
        (WideResNet(depth=16, widen=1, classes=10, channels=3, image_size=32), 3),
        (resnet(depth=18, stem="cifar", classes=10, channels=3, image_size=32), 4),
        (PreActResNet18(classes=10, channels=3, image_size=32), 4),
        (vgg19_bn(classes=10, channels=3, image_size=32), 4),
    ],
    ids=["wrn", "resnet18", "preact", "vgg"],
)
def test_stages_go_from_fine_to_coarse(network: nn.Module, count: int) -> None:
    found = stages(network.eval(), torch.zeros(2, 3, 32, 32))
    with capture(found) as seen, torch.no_grad():
        network(torch.zeros(2, 3, 32, 32))
    sizes = [f.shape[-1] for f in seen]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes) >= count
    head = executed_after(network, found[-1], torch.zeros(2, 3, 32, 32))
    assert head[-1] is classifier(network)


@pytest.mark.parametrize(
    ("selection", "expected"), [("fixed", 0.1), ("validation", 0.5), ("oracle", 0.9)]
)
def test_choice_follows_the_selection(
    selection: str, expected: float, images: Resident, make_runtime
) -> None:
    """0.9 alone costs accuracy; an oracle that sees ASR fall to 0 by it takes it nevertheless."""
    network = tiny(SPEC)
    labels = Oracle.of(images, network)

    def measure(net) -> dict[str, float]:
        spoilt = bool((classifier(net).weight == 0).all())
        return {"acc": 0.8 - 0.5 * spoilt, "asr": 1.0 - spoilt}

    data = DefenderData(Budget(fraction=0.2), pool=labels, train_size=400, seed=0, oracle=measure)

    def spoil(net, share):
        if share > 0.5:
            classifier(net).weight.data.zero_()
            classifier(net).bias.data.copy_(torch.tensor([9.0, 0, 0, 0]))

    choice, chosen = choose(
        network,
        [0.1, 0.5, 0.9],
        spoil,
        fixed=0.1,
        selection=selection,
        max_drop=0.1,
        data=data,
        runtime=make_runtime(),
    )
    assert choice == expected
    assert (accuracy(chosen, data.validation(), make_runtime()) == 1) == (expected < 0.9)
    assert (classifier(network).weight != 0).any(), "works on copies"


@pytest.mark.parametrize(("relative", "expected"), [(False, 0.5), (True, 0.2)])
def test_a_drop_in_points_or_in_shares(
    relative: bool, expected: float, images: Resident, make_runtime
) -> None:
    """From 50 % by 10: 42 % are within 10 points, but below nine tenths."""
    accuracies = {0.0: 0.5, 0.2: 0.46, 0.5: 0.42, 0.9: 0.39}

    def mark(net: Normalized, choice: float) -> None:
        classifier(net).bias.data[0] = choice

    def measure(net: Normalized) -> float:
        return accuracies[round(float(classifier(net).bias[0].detach()), 1)]

    network = tiny(SPEC)
    mark(network, 0.0)
    choice, _ = choose(
        network,
        [*accuracies],
        mark,
        fixed=0.0,
        selection="validation",
        max_drop=0.1,
        data=granted(images, fraction=0.1),
        runtime=make_runtime(),
        relative=relative,
        measure=measure,
    )
    assert choice == expected


def test_fine_pruning_drops_a_share_and_measures_the_head_alone(
    compose_config, images: Resident, make_runtime, monkeypatch
) -> None:
    network, seen = tiny(SPEC), {}

    def spy(network, *args, **how):
        seen.update(how)
        return choose(network, *args, **how)

    monkeypatch.setattr("defenses.fine_pruning.choose", spy)
    data = granted(Oracle.of(images, network), fraction=0.1)
    build("fine_pruning", compose_config).repair(copy.deepcopy(network), data, make_runtime())
    assert seen["relative"]
    measure = head_accuracy(network, images, make_runtime())
    pruned = copy.deepcopy(network)
    classifier(pruned).weight.data[:, ::2] = 0
    for net in (network, pruned):
        assert measure(net) == accuracy(net, images, make_runtime())


class Oracle:
    """Images labelled by a network itself, so that it is always right."""

    @staticmethod
    @torch.no_grad()
    def of(images: Resident, network: nn.Module) -> Resident:
        head = classifier(network)
        logits = network(images.images / 255)
        head.bias -= logits.mean(0)  # so that every class occurs
        return Resident(images.images, network(images.images / 255).argmax(1))


def test_universal_perturbation_changes_predictions() -> None:
    network = tiny(SPEC)
    x, _ = batch(16)
    images = Resident(x.mul(255).byte(), torch.zeros(16, dtype=torch.long))
    batches = TrainingBatches(
        images, spec=SPEC, batch_size=8, seed=0, device=torch.device("cpu"), steps=6
    )
    delta = universal(network, batches, learning_rate=1e4)
    assert delta.shape == (1, *SPEC.shape)
    with torch.no_grad():
        kept = network(x).argmax(1) == network(x + delta).argmax(1)
    assert kept.float().mean() < 1


# ---------------------------------------------------------------- losses, scores and steps


def test_attention_maps_by_loops() -> None:
    features = torch.randn(2, 3, 4, 5)
    found = attention(features, 2)
    for b in range(2):
        plain = torch.zeros(4, 5)
        for c in range(3):
            for i in range(4):
                for j in range(5):
                    plain[i, j] += abs(features[b, c, i, j]) ** 2
        torch.testing.assert_close(found[b], plain / plain.square().sum().sqrt())


def test_fisher_trace_by_explicit_gradients() -> None:
    """Over all sign vectors the estimate averages to mean_i |grad l_i|^2, exactly."""
    torch.manual_seed(0)
    net = nn.Linear(3, 2).double()
    x, y = torch.randn(3, 3).double(), torch.tensor([0, 1, 1])
    weights = list(net.parameters())
    each = F.cross_entropy(net(x), y, reduction="none")
    explicit = 0.0
    for i in range(3):
        slopes = torch.autograd.grad(each[i], weights, retain_graph=True)
        explicit += sum(float(g.square().sum()) for g in slopes) / 3

    found = []
    for chosen in itertools.product((-1.0, 1.0), repeat=3):
        mixed = (torch.tensor(chosen).double() * each).sum()
        slopes = torch.autograd.grad(mixed, weights, retain_graph=True)
        found.append(sum(float(g.square().sum()) for g in slopes) / 3)
    assert sum(found) / 8 == pytest.approx(explicit, rel=1e-12)
    rng = generator(0)
    drawn = [float(fisher_trace(each, weights, rng).detach()) for _ in range(300)]
    assert np.mean(drawn) == pytest.approx(explicit, rel=0.15)
    assert {min(found, key=lambda v: abs(v - d)) == pytest.approx(d) for d in drawn} == {True}
    trace = fisher_trace(each, weights, rng)
    assert torch.autograd.grad(trace, weights[0])[0].abs().sum() > 0


def test_spectrum_starts_at_the_weight_and_moves_singular_values() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 2, 2)
    spectrum = Spectrum(weight)
    torch.testing.assert_close(spectrum(weight), weight)
    spectrum.shift.data[0] = 1.0
    before, after = (torch.linalg.svdvals(w.flatten(1)) for w in (weight, spectrum(weight)))
    torch.testing.assert_close(after, before + torch.tensor([1.0, 0, 0, 0]))


def test_implicit_gradient_of_a_quadratic_game() -> None:
    """Fixed point delta* = A theta: the total derivative of g(delta*(theta), theta) is known."""
    torch.manual_seed(0)
    a = torch.randn(4, 3, dtype=torch.float64)
    theta = torch.randn(3, dtype=torch.float64, requires_grad=True)
    delta = (a @ theta).detach().requires_grad_(True)

    def outer(d, t):
        return (d**3).sum() + d.sum() * t.square().sum()

    mapped = delta - 0.1 * (delta - a @ theta)
    loss = implicit(outer(delta, theta), mapped, delta, steps=400)
    (ours,) = torch.autograd.grad(loss, theta)
    step = 1e-6
    for i in range(3):
        shift = torch.zeros(3, dtype=torch.float64)
        shift[i] = step
        high, low = (outer(a @ (theta + s), theta + s) for s in (shift, -shift))
        expected = float((high - low).detach() / (2 * step))
        assert float(ours[i]) == pytest.approx(expected, rel=1e-5)


def test_natural_gradient_by_an_explicit_fisher_matrix() -> None:
    torch.manual_seed(0)
    h, w = torch.randn(6, 3).double(), torch.randn(4, 3).double()
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    p = (h @ w.T).softmax(1)
    explicit = torch.zeros(12, 12).double()
    for hi, pi in zip(h, p, strict=True):
        explicit += torch.kron(torch.diag(pi) - torch.outer(pi, pi), torch.outer(hi, hi)) / 6
    v = torch.randn(4, 3).double()
    torch.testing.assert_close(fisher_product(p, h, v).flatten(), explicit @ v.flatten())
    slope = gradient(p, h, y)
    weight = w.clone().requires_grad_(True)
    (auto,) = torch.autograd.grad(F.cross_entropy(h @ weight.T, y), weight)
    torch.testing.assert_close(slope, auto)
    step = conjugate_gradients(lambda u: fisher_product(p, h, u) + 0.01 * u, slope, 50)
    solved = torch.linalg.solve(explicit + 0.01 * torch.eye(12).double(), slope.flatten())
    torch.testing.assert_close(step.flatten(), solved, atol=1e-8, rtol=1e-6)
    diagonal = torch.stack(
        [gradient(p[i : i + 1], h[i : i + 1], y[i : i + 1]).square() for i in range(6)]
    ).mean(0)
    torch.testing.assert_close(fisher_diagonal(p, h, y), diagonal)


def steep() -> SGDSchedule:
    """Five epochs at rate 1."""
    return SGDSchedule(
        epochs=5,
        batch_size=32,
        learning_rate=1.0,
        momentum=0.9,
        nesterov=False,
        weight_decay=0,
        shape=Cosine(end=0.0),
    )


def test_unlearning_stops_in_the_middle_of_an_epoch(toys, make_runtime) -> None:
    clean, _, _, given, _ = toys
    network, runtime = copy.deepcopy(clean), make_runtime()
    schedule = steep()
    reached = unlearn(network, given, schedule, runtime, stop_accuracy=0.4, clip=20.0)
    assert reached <= 0.4
    state = torch.load(runtime.workdir / "unlearn" / "last.ckpt", weights_only=True)
    assert state["global_step"] % 37 > 0, "37 batches are an epoch"


def test_unlearning_that_was_done_is_not_done_again(toys, make_runtime) -> None:
    """A run killed in a later stage comes back to the same network."""
    clean, _, _, given, _ = toys
    schedule = steep()
    first, again = copy.deepcopy(clean), copy.deepcopy(clean)
    reached = [
        unlearn(n, given, schedule, make_runtime(), stop_accuracy=0.4, clip=20.0)
        for n in (first, again)
    ]
    assert reached[0] == reached[1]
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in first.state_dict().items())


def test_few_images_are_divided_evenly() -> None:
    found = [even(n, 128) for n in (500, 400, 128, 129, 40)]
    assert found == [125, 100, 128, 64, 40]


def test_awm_sees_the_images_as_they_are(
    compose_config, images: Resident, make_runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, data = build("awm", compose_config), granted(images, fraction=0.1)
    own = {x.numpy().tobytes() for x in to_float(data.clean().resident().images)}
    seen: list[torch.Tensor] = []

    def spy(network, batches, *, learning_rate: float) -> torch.Tensor:
        seen.extend(b.images for b in batches)
        return torch.zeros(1, 3, 16, 16)

    monkeypatch.setattr("defenses.awm.universal", spy)
    method(suspect(), data, make_runtime())
    assert len(seen) >= 5
    assert {x.numpy().tobytes() for b in seen for x in b} <= own


def test_cosine_may_end_above_zero(compose_config) -> None:
    schedule = build("nft", compose_config).schedule
    rates = [schedule.learning_rate * schedule.factor(p / 5) for p in range(6)]
    assert rates == pytest.approx([0.05, 0.0471, 0.0396, 0.0304, 0.0229, 0.02], abs=5e-5)


def test_pbe_is_adversarial_at_first(
    compose_config, images: Resident, make_runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = build("pbe", compose_config, adversarial_batches=2)
    method.schedule.epochs, method.schedule.batch_size = 2, 10
    count = []
    monkeypatch.setattr("defenses.pbe.pgd", lambda net, x, y, **_: count.append(len(x)) or x)
    data = DefenderData(Budget(poisoned=True), pool=images, train_size=400, seed=0, poisoned=images)
    method(suspect(), data, make_runtime())
    first = max(1, round(method.first_share * len(images)) // 10)
    assert len(count) == 2 * first + 2 * len(method.shares)


def test_a_frozen_suspect_is_tuned_as_a_whole(
    compose_config, images: Resident, make_runtime
) -> None:
    frozen = suspect()
    frozen.network.requires_grad_(False)
    repaired = [
        build("finetune", compose_config)(s, granted(images, fraction=0.1), make_runtime(work=w))
        for s, w in ((suspect(), "free"), (frozen, "frozen"))
    ]
    for one, other in zip(*(r.state_dict().values() for r in repaired), strict=True):
        assert torch.equal(one, other)


def test_the_trace_goes_through_attention() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 3, 8)
    with sdpa_kernel(SDPBackend.MATH):  # as FIP does
        out, _ = attention(x, x, x, need_weights=False)
    each = out.square().mean(dim=(1, 2))
    fisher_trace(each, list(attention.parameters()), generator(0)).backward()
    assert float(attention.in_proj_weight.grad.abs().sum()) > 0


def test_evolution_ends_without_progress() -> None:
    ends = Stagnation()
    values = [5.0, 4.0, *[4.0 - 1e-7] * 12]
    said = [ends(OptimizeResult(fun=v)) for v in values]
    assert said.index(True) == 11, "ten generations after the second"


def test_sam_step_by_hand() -> None:
    """w = (3, 4), g = (1, 0): |w| g = (3, 0), norm 3; e = 2 * (9, 16) * (1, 0) / 3 = (6, 0)."""
    (step,) = ascent([torch.tensor([3.0, 4])], (torch.tensor([1.0, 0]),), 2.0)
    torch.testing.assert_close(step, torch.tensor([6.0, 0]))


def test_local_ascent_turns_the_gradient_of_easy_images() -> None:
    each = torch.tensor([0.1, 2.0], requires_grad=True)
    local_ascent(each, 0.5).backward()
    assert each.grad.tolist() == [-0.5, 0.5]


def test_reset_rows_and_no_others() -> None:
    head = nn.Linear(8, 3)
    before = head.weight.detach().clone()
    reset(head, [1], generator(0))
    assert torch.equal(head.weight[[0, 2]], before[[0, 2]])
    assert not torch.equal(head.weight[1], before[1])
    assert head.weight[1].abs().max() <= math.sqrt(2 / 8)
    assert head.bias[1] == 0


def test_anp_noise_stays_in_its_band_and_hurts() -> None:
    network = tiny(SPEC)
    network.requires_grad_(False)
    layers = batch_norms(network, method="anp")
    scales = [*attach(layers), *attach(layers, "bias")]
    schedule = SGDSchedule(
        epochs=1,
        batch_size=4,
        learning_rate=0.1,
        momentum=0,
        nesterov=False,
        weight_decay=0,
        shape=Cosine(end=0.0),
    )
    method = ANP(
        epsilon=0.4,
        alpha=0.2,
        noise_steps=5,
        steps=1,
        threshold=0.2,
        selection="fixed",
        max_drop=0.1,
        schedule=schedule,
    )
    x, y = batch()
    method.disturb(network, scales, x, y, generator(0))
    assert max(float(s.noise.abs().max()) for s in scales) <= 0.4 + 1e-6
    with torch.no_grad():
        hurt = F.cross_entropy(network(x), y)
        for scale in scales:
            scale.noise = torch.zeros_like(scale.noise)
        calm = F.cross_entropy(network(x), y)
    assert hurt > calm


def test_one_shot_images_are_enlarged(compose_config, images: Resident, make_runtime) -> None:
    method = build("awm_one_shot", compose_config)
    assert isinstance(method, AWM)
    one = granted(images, per_class=1).clean()
    more = method.enlarged(one, tiny(SPEC), make_runtime())
    assert len(more) == 4 * 10
    assert torch.equal(more.images[:4], one.resident().images)
    assert more.labels.bincount().tolist() == [10] * 4


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


@pytest.mark.parametrize(
    "network",
    [
        resnet(depth=18, stem="cifar", classes=4, channels=3, image_size=16),
        PreActResNet18(classes=4, channels=3, image_size=16),
        WideResNet(depth=16, widen=1, classes=4, channels=3, image_size=16),
    ],
    ids=["resnet18", "preact", "wrn"],
)
def test_a_shortcut_times_one_is_the_shortcut(network: nn.Module) -> None:
    network = Normalized(network, SPEC)
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
    tree = {"data": {"name": "x"}, "model": {}}
    save_weights(tmp_path, tree, InMemoryVictim(nn.Identity()), repaired)
    with pytest.raises(ArtefactError, match=r"not the network that was .*stages\.0\.0 has"):
        CheckpointFile(path=str(tmp_path / "purified.safetensors")).load_into(tiny(SPEC))
    folded = ssft(compose_config, selection="fixed", block=1).repair(tiny(SPEC), data, runtime)
    assert folded.unwritten == ""


def test_the_published_choice_is_the_shortcut_with_the_largest_jump(images: Resident) -> None:
    def measure(net) -> dict[str, float]:
        inner = [b.downsample for b in blocks(net, method="x", least=1)]
        first, second = (g.factor if isinstance(g, Gate) else 1.0 for g in inner[:2])
        return {"acc": 0.9, "asr": 0.6 * (second > 0.45) + 0.3 * (first > 0.45)}

    network = resnet(depth=18, stem="cifar", classes=10, channels=3, image_size=32)
    data = DefenderData(Budget(), pool=images, train_size=400, seed=0, oracle=measure)
    assert critical(network, [*range(8)], data) == 1
    assert critical(network, [0, 3], data) == 0


def test_networks_without_shortcuts_are_refused() -> None:
    with pytest.raises(ConfigError, match="defense=ssft: the network has 0 residual blocks"):
        blocks(vgg19_bn(classes=10, channels=3, image_size=32), method="ssft", least=1)


def test_trap_and_replace_touches_the_head_alone(
    compose_config, images: Resident, make_runtime
) -> None:
    """The head starts anew (its rate is next to nothing) and learns behind heavy dropout."""
    method = build("trap_and_replace", compose_config, dropout=0.99)
    method.head_schedule.learning_rate = 1e-9
    network = tiny(SPEC)
    cut, last = blocks(network, method="x", least=2)[-2:]
    data = granted(images, fraction=0.1)
    before = copy.deepcopy(network.state_dict())
    dropped = []

    def watch(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        dropped.append(float((args[0].flatten(1) == 0).float().mean()))

    handles = [m.register_forward_hook(watch) for m in (last.conv2, network.network.head)]
    method.replace(network, cut, [last], data, make_runtime())
    for handle in handles:
        handle.remove()
    assert min(dropped[-2:]) > 0.6, "one of 16 places has to stay for the mean to be there"
    after = network.state_dict()
    changed = {k for k, v in after.items() if not torch.allclose(v, before[k], atol=1e-4)}
    assert all(k.startswith(("network.stages.1", "network.head")) for k in changed)
    assert {k for k in after if k.startswith("network.stages.1") and "conv" in k} <= changed
    assert "network.head.weight" in changed


def test_decoder_and_total_variation() -> None:
    for features, size, channels in (((64, 8, 8), 32, 3), ((64, 7, 7), 28, 1), ((64, 7, 7), 32, 3)):
        x = torch.zeros(2, *features)
        assert decoder(x, size, channels)(x).shape[1:] == (channels, size, size)
    published = [type(m).__name__ for m in decoder(torch.zeros(2, 64, 8, 8), 32, 3)]
    assert published == ["ConvTranspose2d", "ReLU", "ConvTranspose2d", "Sigmoid"]
    x = torch.tensor([[[[0.0, 1], [2, 3]]]])  # down: 4 + 4, right: 1 + 1
    assert float(total_variation_squared(x)) == 10 / 4


def test_rectangles_by_hand() -> None:
    found = rectangles(torch.tensor([[1], [2], [2], [1]]), 4)[0]
    assert found.nonzero().tolist() == [[1, 2], [2, 2]]


def test_class_activation_looks_at_the_bright_spot() -> None:
    network = tiny(SPEC)
    x = torch.zeros(SPEC.shape)
    x[:, 10:14, 10:14] = 1
    heat = smooth_cam(network, x, 0, 0)
    assert heat.shape == (16, 16)
    assert heat.min() >= 0


def test_fresh_networks_are_new_and_seeded() -> None:
    vit = timm.create_model(
        "vit_tiny_patch16_224", num_classes=4, img_size=16, patch_size=8, depth=1
    )
    for network in (tiny(SPEC), Normalized(vit, SPEC), Normalized(Attentive(), SPEC)):
        trained(network)
        a, b, c = (dict(fresh(network, s, method="x").named_parameters()) for s in (1, 1, 2))
        for key, old in network.named_parameters():
            assert torch.equal(a[key], b[key])
            assert not torch.equal(a[key], old), key
            constant = (a[key] == a[key].flatten()[0]).all()
            assert constant or not torch.equal(a[key], c[key]), key


@pytest.mark.parametrize(("name", "weight"), [("vit_b_32", "class_token"), ("convnext", "gamma")])
def test_a_network_that_cannot_start_anew_is_refused(name: str, weight: str) -> None:
    if name == "convnext":
        network = timm.create_model("convnext_atto", num_classes=4, depths=(1, 1, 1, 1))
    else:
        network = VisionTransformer(16, 8, 1, 2, 16, 32, num_classes=4)
    suspect = trained(Normalized(network, SPEC))
    with pytest.raises(
        ConfigError, match=rf"defense=abl: it trains anew, .*{weight}.*repairs the trained"
    ):
        fresh(suspect, 1, method="abl")


class Attentive(nn.Module):
    """Attention's own weights are drawn by a method of another name."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 4)


def trained(network: Normalized) -> Normalized:
    """The network with no weight where it was, so that none is a constant."""
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p))
    return network


# ---------------------------------------------------------------- on a toy victim that works


def toy(count: int, seed: int) -> Resident:
    """Four classes of coloured stripes under noise: a task that a tiny network learns at once."""
    rng = generator(seed)
    labels = torch.arange(count) % 4
    at = torch.arange(16)
    stripes = torch.stack([((at // w) % 2).float() for w in (1, 2, 4, 8)])  # (4, 16)
    x = 0.25 + 0.35 * stripes[labels][:, None, None, :].expand(-1, 3, 16, -1)
    x = x + 0.15 * torch.randn(x.shape, generator=rng)
    return Resident(x.clamp(0, 1).mul(255).byte(), labels)


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """(clean network, backdoored network, attack, training set, test set)."""
    from dhbe.training.runtime import Runtime
    from dhbe.training.trainer import TrainerConfig

    spec = make_spec(flip=False, crop_padding=0)
    config = TrainerConfig(
        device="cpu", precision="32-true", threads=0, progress="never", observe_every=0
    )
    schedule = SGDSchedule(
        epochs=4,
        batch_size=32,
        learning_rate=0.1,
        momentum=0.9,
        nesterov=True,
        weight_decay=5e-4,
        shape=OneCycle(),
    )
    given, test = toy(1200, 0), toy(400, 1)
    attack = badnets(spec, poison_rate=0.1, patch_size=8)
    networks = []
    for name, rate in (("clean", 0.0), ("backdoored", 0.1)):
        runtime = Runtime(
            trainer_config=config, seed=0, workdir=tmp_path_factory.mktemp("toy") / name
        )
        network = tiny(spec).train()
        train(network, badnets(spec, poison_rate=rate, patch_size=8), given, schedule, runtime)
        networks.append(network.eval())
    return (*networks, attack, given, test)


def measured(network: Normalized, attack, test: Resident) -> tuple[float, float]:
    found = rates(
        (e := Evaluator(test, attack, device=torch.device("cpu"))).predict(network.eval()), e.truth
    )
    return found["acc"].value, found["asr"].value


def test_the_toy_victim_is_backdoored(toys) -> None:
    clean, backdoored, attack, _, test = toys
    assert measured(clean, attack, test)[0] > 0.97
    assert measured(clean, attack, test)[1] < 0.1
    assert measured(backdoored, attack, test)[0] > 0.97
    assert measured(backdoored, attack, test)[1] > 0.97


SPARED = ("dhbe", "dfad", "abl", "none")
GENTLE = [d for d in DEFENSES if not d.startswith(SPARED)]


@pytest.mark.parametrize("name", GENTLE)
def test_a_clean_network_keeps_its_accuracy(name: str, compose_config, toys, make_runtime) -> None:
    """Within 3 points, with a few real steps of every method."""
    clean, _, attack, given, test = toys
    quick = {
        "nad": {"betas": [50.0, 50.0]},
        "trap_and_replace": {},
    }
    defense = repairing(name, compose_config, quick.get(name, {}))
    repaired = defense(
        Suspect(network=clean, architecture="toy", spec=clean.spec),
        toy_data(attack, given),
        make_runtime(),
    )
    before, after = (measured(n, attack, test)[0] for n in (clean, repaired))
    assert after >= before - 0.03


def toy_data(attack, given: Resident) -> DefenderData:
    codes = attack.select(given.labels, generator(0, "codes"))
    return DefenderData(
        Budget(name="toy", fraction=0.1, poisoned=True, incoming=6),
        pool=toy(400, 2),
        train_size=2000,
        seed=0,
        poisoned=attack.poison(given, codes, seed=0).resident(),
        trigger=lambda x, y, index: attack.apply(x, y=y, index=index),
    )


def repairing(name: str, compose_config, options):
    """A defense with enough steps to do something on the toy."""
    from hydra.utils import instantiate

    from dhbe.config.schema import plain

    node = plain(compose_config(f"defense={name}"))["defense"] | options

    def lengths(part):
        small = {"epochs": 4, "steps": 30, "batch_size": 32, "generations": 5, "inputs": 4}
        small |= {"population": 12, "verification": 40}
        if not isinstance(part, dict):
            return part
        return {k: small.get(k, lengths(v)) for k, v in part.items()}

    return instantiate(lengths(node), _convert_="all")


@pytest.mark.parametrize(
    "name", ["anp", "awm", "fine_pruning", "neural_cleanse", "rnp", "trap_and_replace"]
)
def test_the_toy_backdoor_goes(name: str, compose_config, toys, make_runtime) -> None:
    """These need few steps for it; the others are measured on CIFAR-10 (docs/results)."""
    _, backdoored, attack, given, test = toys
    victim = Suspect(network=backdoored, architecture="toy", spec=backdoored.spec)
    defense = repairing(name, compose_config, {})
    acc, asr = measured(defense(victim, toy_data(attack, given), make_runtime()), attack, test)
    assert acc > 0.95
    assert asr < 0.5


@pytest.mark.parametrize(
    ("name", "innocent"),
    [("neural_cleanse", "classes []"), ("cetf", "classes []")],
)
def test_detectors_name_the_target_class(
    name: str, innocent: str, compose_config, toys, make_runtime
) -> None:
    clean, backdoored, attack, given, _ = toys
    for network, expected in ((backdoored, "classes [0]"), (clean, innocent)):
        runtime = make_runtime()
        victim = Suspect(network=network, architecture="toy", spec=network.spec)
        repairing(name, compose_config, {})(victim, toy_data(attack, given), runtime)
        assert any(expected in note for note in runtime.recorder.notes)
