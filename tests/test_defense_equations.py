"""Each defense's losses, scores and steps against slow, obvious references."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from scipy.optimize import linprog
from torch import nn
from torch.nn import functional as F

from defenses.abl import local_ascent
from defenses.anp import ANP
from defenses.awm import AWM
from defenses.bnp import divergence
from defenses.ep import uniformity
from defenses.fine_pruning import head_accuracy
from defenses.fip import Spectrum, fisher_trace
from defenses.ft_sam import ascent
from defenses.i_bau import implicit
from defenses.nad import attention
from defenses.neural_cleanse import Trigger
from defenses.ngf import conjugate_gradients, fisher_diagonal, fisher_product, gradient
from defenses.otbr import fuse
from defenses.trap_and_replace import decoder
from defenses.tsbd import reinitialise
from defenses.ulrl import reset
from dhbe.config.schema import plain
from dhbe.core.errors import ConfigError
from dhbe.core.rng import generator
from dhbe.data import Budget, DefenderData, Resident, to_float
from dhbe.methods.losses import total_variation_squared
from dhbe.methods.masks import attach, batch_norms
from dhbe.methods.selection import accuracy, choose
from dhbe.models import Normalized
from dhbe.models.dataflow import classifier
from dhbe.models.polarizer import Polarizer, place
from dhbe.models.preact import PreActResNet18
from dhbe.models.shortcuts import blocks, filters
from dhbe.training.schedule import Cosine, SGDSchedule
from tests.support.attacks import tiny
from tests.support.defenses import batch, build, granted, self_labelled, suspect
from tests.support.fixtures import make_spec

SPEC = make_spec()


def test_fine_pruning_drops_a_share_and_measures_the_head_alone(
    compose_config, images: Resident, make_runtime, monkeypatch
) -> None:
    network, seen = tiny(SPEC), {}

    def spy(network, *args, **how):
        seen.update(how)
        return choose(network, *args, **how)

    monkeypatch.setattr("defenses.fine_pruning.choose", spy)
    data = granted(self_labelled(images, network), fraction=0.1)
    build("fine_pruning", compose_config).repair(copy.deepcopy(network), data, make_runtime())
    assert seen["relative"]
    measure = head_accuracy(network, images, make_runtime())
    pruned = copy.deepcopy(network)
    classifier(pruned).weight.data[:, ::2] = 0
    for net in (network, pruned):
        assert measure(net) == accuracy(net, images, make_runtime())


@pytest.mark.parametrize(("ranking", "first"), [("signed", [2, 0]), ("absolute", [1, 3])])
def test_fine_pruning_ranks_as_it_says(
    ranking: str, first: list[int], compose_config, images: Resident, make_runtime, monkeypatch
) -> None:
    """Means -2, 0.1, -3, 0.2, 5, 6, ...: the lowest ones against those nearest to 0."""
    network = tiny(SPEC)
    means = torch.arange(3.0, 3 + classifier(network).in_features)
    means[:4] = torch.tensor([-2, 0.1, -3, 0.2])
    monkeypatch.setattr("defenses.fine_pruning.features", lambda _, x: means.expand(len(x), -1))
    found = []

    def spy(network, choices, cut, **how):
        pruned = copy.deepcopy(network)
        cut(pruned, 2 / len(means))
        found.extend((classifier(pruned).weight == 0).all(0).nonzero().flatten().tolist())
        return 0.0, network

    monkeypatch.setattr("defenses.fine_pruning.choose", spy)
    method = build("fine_pruning", compose_config, ranking=ranking)
    method.repair(network, granted(images, fraction=0.1), make_runtime())
    assert found == sorted(first)


def test_ft_sam_rates_are_those_of_a_scheduler_stepped_in_every_batch(compose_config) -> None:
    """BackdoorBench: 2,500 images, 100 epochs, CosineAnnealingLR(T_max=100) after each batch."""
    method = instantiate(plain(compose_config("defense=ft_sam", "scale=paper"))["defense"])
    schedule = method.waved(2560)  # ten batches of 256
    steps = 1000
    rates = [0.01 * schedule.factor(step / steps) for step in range(steps)]
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.01)
    official = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    for rate in rates:
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        official.step()
    assert min(rates[90:110]) < 1e-6 < 0.0099 < rates[200]
    method.wave = 0
    assert method.waved(2560) is method.schedule


def test_nft_rates_are_held_for_200_steps(compose_config) -> None:
    """Official: CosineAnnealingLR(T_max=5, eta_min=0.02), stepped every 200 of 1,000 batches."""
    method = instantiate(plain(compose_config("defense=nft", "scale=paper"))["defense"])
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.05)
    official = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5, 0.02)
    held = method.held()
    for epoch in range(5):
        for step in (0, 99, 199):
            rate = 0.05 * held.factor((200 * epoch + step + 0.5) / 1000)
            assert rate == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        official.step()


def test_nft_floors_scale_with_the_depth(compose_config) -> None:
    """0.8 exp(-l / 2): 0.485, 0.294 ... of 20 masks; of 5 masks the fourth, eighth ... of them."""
    method = build("nft", compose_config)
    official = [0.8 * math.exp(-0.5 * i) for i in range(1, 21)]
    assert method.floors(20) == pytest.approx(official)
    assert method.floors(5) == pytest.approx(official[:5])
    scaled = build("nft", compose_config, depth=20)
    assert scaled.floors(20) == pytest.approx(official)
    assert scaled.floors(5) == pytest.approx(official[3::4])


def test_neural_cleanse_starts_at_0_88(compose_config) -> None:
    method = build("neural_cleanse", compose_config)
    mask, pattern = Trigger(tiny(SPEC), method.start)()
    assert mask.shape == (1, 1, 16, 16)
    for value in (mask, pattern):
        torch.testing.assert_close(value, torch.full_like(value, 0.88079708), atol=1e-6, rtol=0)


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


def test_awm_sees_the_images_as_they_are(
    compose_config, images: Resident, make_runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, data = build("awm", compose_config, passes=5), granted(images, fraction=0.1)
    own = {x.numpy().tobytes() for x in to_float(data.clean().resident().images)}
    seen: list[torch.Tensor] = []

    def spy(network, batches, *, learning_rate: float) -> torch.Tensor:
        seen.extend(b.images for b in batches)
        return torch.zeros(1, 3, 16, 16)

    monkeypatch.setattr("defenses.awm.universal", spy)
    method(suspect(), data, make_runtime())
    assert len(seen) >= 5
    assert {x.numpy().tobytes() for b in seen for x in b} <= own


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


@pytest.mark.parametrize(("bounded", "most"), [(True, 0.4), (False, 0.8)])
def test_anp_noise_stays_in_its_band_and_hurts(bounded: bool, most: float) -> None:
    """Official code starts in [-eps, eps] and climbs by eps: some noise is beyond eps."""
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
        bounded=bounded,
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
    furthest = max(float(s.noise.abs().max()) for s in scales)
    assert most - 0.3 < furthest <= most + 1e-6
    assert bounded or furthest > 0.4
    with torch.no_grad():
        hurt = F.cross_entropy(network(x), y)
        for scale in scales:
            scale.noise = torch.zeros_like(scale.noise)
        calm = F.cross_entropy(network(x), y)
    assert hurt > calm


def test_one_shot_images_are_enlarged(compose_config, images: Resident, make_runtime) -> None:
    method = build("awm_one_shot", compose_config, copies=9)
    assert isinstance(method, AWM)
    one = granted(images, per_class=1).clean()
    more = method.enlarged(one, tiny(SPEC), make_runtime())
    assert len(more) == 4 * 10
    assert torch.equal(more.images[:4], one.resident().images)
    assert more.labels.bincount().tolist() == [10] * 4


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


def plan_of(target: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Cheapest plan from equal masses to ``target``, by linear programming."""
    n, m = cost.shape
    rows = [np.kron(row, np.ones(m)) for row in np.eye(n)]
    columns = [np.kron(np.ones(n), column) for column in np.eye(m)]
    masses = np.concatenate([np.full(n, 1 / n), target])
    found = linprog(cost.ravel(), A_eq=np.array(rows + columns), b_eq=masses)
    return found.x.reshape(n, m)


def test_otbr_carries_pruned_filters_by_the_cheapest_plans() -> None:
    """Three layers, of which the first loses none, by sums over filters and another solver."""
    rng = generator(0, "otbr")
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3), nn.Conv2d(5, 3, 3)).double()
    network.shortcut = nn.Conv2d(3, 3, 1)
    before = [m.weight.detach().numpy().copy() for m in filters(network)]
    changes = [torch.rand(n, generator=rng).double() + low for n, low in ((4, 0.1), (5, 2), (3, 1))]
    fuse(network, changes, share=0.2, lam=0.4)
    changes = [c.numpy() for c in changes]
    lost = set(np.argsort(-np.concatenate(changes))[:2])  # of 12
    assert min(lost) >= 4
    carried = np.eye(4)
    for layer, change, old, start in zip(
        filters(network)[1:], changes[1:], before[1:], (4, 9), strict=True
    ):
        pruned = old.copy()
        pruned[[k - start for k in lost if start <= k < start + len(old)]] = 0
        target = change / change.sum()
        cost = np.linalg.norm((pruned[:, None] - old[None]).reshape(*[len(old)] * 2, -1), axis=2)
        plan = plan_of(target, cost)
        wanted = np.zeros_like(old)
        for o, p, j, i in itertools.product(
            range(len(old)), range(len(old)), range(old.shape[1]), range(len(carried))
        ):
            wanted[o, j] += plan[p, o] / target[o] * pruned[p, i] * carried[i, j]
        assert np.allclose(layer.weight.detach().numpy(), 0.4 * wanted + 0.6 * old, atol=1e-9)
        carried = plan / target
    assert np.array_equal(filters(network)[0].weight.detach().numpy(), before[0])
    assert len(filters(network)) == 3, "shortcuts are left alone"


def test_otbr_measures_what_unlearning_noise_changes(compose_config, make_runtime) -> None:
    """Steps of ascent on the network itself, without its normalisation; the suspect stays."""
    victim = suspect().network
    before = {k: v.clone() for k, v in victim.state_dict().items()}
    changes = build("otbr", compose_config).unlearned(victim, make_runtime())
    assert [len(c) for c in changes] == [c.out_channels for c in filters(victim)]
    assert all((c > 0).any() for c in changes)
    assert all(torch.equal(v, before[k]) for k, v in victim.state_dict().items())


def test_bnp_compares_normal_distributions() -> None:
    norm, x = nn.BatchNorm2d(3), torch.randn(3, 500, generator=generator(0)) * 2 + 1
    inputs = x.view(3, 20, 5, 5).transpose(0, 1)
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    of_batch = torch.distributions.Normal(x.mean(1), (x.var(1) + norm.eps).sqrt())
    kept = torch.distributions.Normal(norm.running_mean, (norm.running_var + norm.eps).sqrt())
    wanted = torch.distributions.kl_divergence(of_batch, kept)
    assert torch.allclose(divergence(norm, inputs), wanted, rtol=1e-4)


def test_ep_counts_bars_of_a_tenth_of_a_deviation() -> None:
    """Against loops over channels and bars; the channel with two modes has the lowest entropy.

    Only the largest input of a channel in each image counts, as in the official code.
    """
    x = torch.randn(4, 400, generator=generator(0))
    x[2] = (x[2] > 0).float() * 6 + 0.2 * torch.randn(400, generator=generator(1))
    smaller = x.T[..., None] - torch.arange(6.0)
    found = uniformity(nn.BatchNorm2d(4), smaller.flip(2).view(400, 4, 2, 3))
    scaled = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
    low, bars = float(scaled.min()), int((scaled.max() - scaled.min()) / 0.1)
    for channel, value in zip(scaled.tolist(), found.tolist(), strict=True):
        shares = [
            sum(low + 0.1 * n < v < low + 0.1 * (n + 1) for v in channel) / 400 for n in range(bars)
        ]
        assert value == pytest.approx(sum(p * math.log(p) for p in shares if p), abs=1e-4)
    assert found.argmax() == 2


def test_channels_that_stand_out_are_pruned(images, compose_config, make_runtime) -> None:
    """A channel whose clean inputs are far from what BatchNorm remembers."""
    victim = suspect()
    norm = victim.network.network.stages[1][0].bn1
    norm.running_mean[3] += 50
    purified = build("bnp", compose_config, u=2.5)(
        victim, granted(images, fraction=0.1), make_runtime()
    )
    pruned = purified.network.stages[1][0].bn1
    assert pruned.weight[3] == pruned.bias[3] == 0
    assert (pruned.weight == 0).sum() == 1


def test_fst_turns_the_classifier_away_at_its_old_length(
    images, compose_config, make_runtime
) -> None:
    victim = suspect()
    before = classifier(victim.network).weight.detach().clone()
    turned = []
    for alpha in (0.0, 50.0):
        purified = build("fst", compose_config, alpha=alpha)(
            victim, granted(images, fraction=0.1), make_runtime(work=str(alpha))
        )
        after = classifier(purified).weight
        assert float(after.detach().norm()) == pytest.approx(float(before.norm()), rel=1e-4)
        turned.append(float((after * before).sum().detach()))
    assert turned[1] < turned[0]


def test_tsbd_zeroes_the_most_changed_weights_of_the_most_changed_neurons() -> None:
    """Against sorting all weights of the chosen neurons in one list."""
    network = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Conv2d(6, 4, 1))
    network.shortcut = nn.Conv2d(2, 2, 1)
    before, rng = copy.deepcopy(network), generator(0, "tsbd")
    moved = [torch.rand(n, size, generator=rng) for n, size in ((6, 18), (4, 6))]
    zeroed = reinitialise(network, moved, neurons=0.35, weights=0.5)
    neurons = [
        (float(row.sum()), i, k) for i, layer in enumerate(moved) for k, row in enumerate(layer)
    ]
    chosen = sorted(neurons, reverse=True)[:3]  # of ten
    flat = [(float(v), i, k, n) for _, i, k in chosen for n, v in enumerate(moved[i][k])]
    gone = {place[1:] for place in sorted(flat, reverse=True)[: len(flat) // 2]}
    assert zeroed == len(gone)
    for i, (new, old) in enumerate(zip(filters(network), filters(before), strict=True)):
        for k, row in enumerate(old.weight.detach().flatten(1)):
            kept = [0.0 if (i, k, n) in gone else float(v) for n, v in enumerate(row)]
            assert new.weight[k].flatten().tolist() == kept
    assert torch.equal(network.shortcut.weight, before.shortcut.weight)


@pytest.mark.parametrize("biased", [False, True])
def test_a_polarizer_folds_into_its_convolution(biased: bool) -> None:
    """As if it were applied to the padded features, before and after folding."""
    rng = generator(0, "polarizer")
    conv = nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=biased).requires_grad_(False)
    norm = nn.BatchNorm2d(5).eval().requires_grad_(False)
    norm.running_var.uniform_(0.5, 2)
    polarizer = Polarizer(conv, norm)
    x = torch.randn(4, 3, 7, 7, generator=rng)
    with torch.no_grad():
        for value in (*polarizer.parameters(), polarizer.norm.running_mean):
            value.copy_(torch.randn(value.shape, generator=rng))
        polarizer.norm.running_var.uniform_(0.5, 2)
    polarizer.eval()
    padded = polarizer.norm(polarizer.mix(F.pad(x, (1, 1, 1, 1))))
    wanted = norm(F.conv2d(padded, conv.weight, conv.bias, stride=2))
    with polarizer.inserted():
        torch.testing.assert_close(norm(conv(x)), wanted)
    polarizer.fold()
    torch.testing.assert_close(norm(conv(x)), wanted)


def test_a_polarizer_stands_before_the_last_convolution_that_takes_a_constant() -> None:
    """In a PreAct-ResNet18 where the official code puts it."""
    spec = make_spec(image_size=32)
    network = Normalized(PreActResNet18(classes=4, channels=3, image_size=32), spec).eval()
    conv, norm = place(network)
    block = network.network.blocks[-1]
    assert (conv, norm) == (block.conv1, block.bn2)
    bare = Normalized(nn.Sequential(nn.Conv2d(3, 4, 16, bias=False), nn.Flatten()), make_spec())
    with pytest.raises(ConfigError, match="no linear layer can be inserted"):
        place(bare.eval())
