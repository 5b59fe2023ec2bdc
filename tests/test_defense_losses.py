"""The loss that a defense really trains with, against the formula of its paper written out."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defenses.cetf import Found
from defenses.seam import wrong
from dhbe.core.rng import generator
from dhbe.core.types import POISON
from dhbe.data import DefenderData, Resident
from dhbe.experiment.summary import isolation
from dhbe.methods.masks import Scale
from dhbe.models import Normalized
from dhbe.models.dataflow import classifier
from tests.support.defenses import build, granted, rich, suspect


class Reached(Exception):
    """The defense handed its loss to the trainer."""


def training(
    method: Any, network: Normalized, data: DefenderData, runtime: Any, patch: pytest.MonkeyPatch
) -> SimpleNamespace:
    """What the defense gives ``Supervised``: network, batches, schedule, loss and more."""
    found = {}

    def grab(network: nn.Module, batches: Any, schedule: Any, **options: Any) -> None:
        found.update(options, network=network, batches=batches, schedule=schedule)
        raise Reached

    patch.setattr("dhbe.training.runtime.Supervised", grab)
    with pytest.raises(Reached):
        method.repair(network.eval(), data, runtime)
    return SimpleNamespace(**found)


def cross_entropies(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """-log p(y|x) of each image, in double."""
    p = logits.detach().double().exp()
    return [-(p[i, y] / p[i].sum()).log() for i, y in enumerate(labels.tolist())]


def scales(network: nn.Module) -> list[Scale]:
    return [m for m in network.modules() if isinstance(m, Scale)]


def test_nft(compose_config, images: Resident, make_runtime, monkeypatch) -> None:
    method, network = build("nft", compose_config), suspect().network
    data = granted(images, fraction=0.1)
    t = training(method, network, data, make_runtime(), monkeypatch)
    batch = next(iter(t.batches))
    rng = batch.rng
    for scale in scales(network):
        scale.mask.data.fill_(0.9)
    before = rng.get_state()
    loss = t.loss(network, batch).detach()
    rng.set_state(before)
    share = float(torch.rand((), generator=rng))
    order = torch.randperm(len(batch.images), generator=rng)
    x, y = batch.images, batch.labels
    pairs = zip(x, x[order], strict=True)
    logits = network(torch.stack([share * a + (1 - share) * b for a, b in pairs]))
    mixed = share * sum(cross_entropies(logits, y)) / len(x)
    mixed += (1 - share) * sum(cross_entropies(logits, y[order])) / len(x)
    per_class = len(data.clean()) / 4
    away = sum(0.1 * s.mask.numel() for s in scales(network))
    assert float(loss) == pytest.approx(float(mixed) + method.pull / per_class * away, rel=1e-5)
    for scale in scales(network):
        scale.mask.data.uniform_(-1, 2)
    t.after_step()
    for i, scale in enumerate(scales(network), start=1):
        low = method.floor * math.exp(-method.decay * i)
        assert scale.mask.min().item() == pytest.approx(low)
        assert scale.mask.max().item() == 1
    tuned = {n.split(".")[-1] for n, p in network.named_parameters() if p.requires_grad}
    assert tuned == {"mask"}


def test_fip(compose_config, images: Resident, make_runtime, monkeypatch) -> None:
    """Anchor: the Fisher diagonal at the suspect, here by one backward pass per image."""
    method = build("fip", compose_config, anchor_weight=5.0, trace_weight=0.0)
    method.schedule.batch_size = 2  # many draws of signs
    network, data = suspect(flip=False, crop_padding=0).network, granted(images, fraction=0.1)
    t = training(method, network, data, make_runtime(), monkeypatch)
    clean = data.clean().resident()
    weights = list(network.parameters())
    exact = [torch.zeros_like(w) for w in weights]
    for x, y in zip(clean.images, clean.labels, strict=True):
        loss = F.cross_entropy(network(x[None] / 255), y[None])
        for total, g in zip(exact, torch.autograd.grad(loss, weights), strict=True):
            total += g.square() / len(clean)
    batch = next(iter(t.batches))
    at_suspect = t.loss(network, batch).item()
    assert at_suspect == pytest.approx(
        float(sum(cross_entropies(network(batch.images), batch.labels))) / len(batch.images)
    )
    with torch.no_grad():
        for w in weights:
            w.add_(0.02)
    here = float(sum(cross_entropies(network(batch.images), batch.labels))) / len(batch.images)
    pull = 5.0 / 2 * sum(float((0.0004 * f).sum()) for f in exact)
    assert t.loss(network, batch).item() - here == pytest.approx(pull, rel=0.2)


def test_awm(compose_config, images: Resident, make_runtime, monkeypatch) -> None:
    method, network = build("awm", compose_config), suspect().network
    found = torch.rand(1, 3, 16, 16)
    monkeypatch.setattr("defenses.awm.universal", lambda *_, **__: found)
    t = training(method, network, granted(images, fraction=0.1), make_runtime(), monkeypatch)
    assert t.train_mode is False, "BatchNorm keeps its statistics"
    t.before_epoch(0.0)
    bound = method.norm / 4  # 16 of 32 pixels
    delta = found * min(1, bound / float(found.abs().sum()))
    batch = next(iter(t.batches))
    x, y = batch.images, batch.labels
    clean = float(sum(cross_entropies(network(x), y))) / len(x)
    wrong = float(sum(cross_entropies(network((x + delta).clip(0, 1)), y))) / len(x)
    sizes = sum(m.weight.numel() for m in network.modules() if isinstance(m, nn.Conv2d))
    hand = method.alpha * clean + (1 - method.alpha) * wrong + method.sparsity * sizes
    assert t.loss(network, batch).item() == pytest.approx(hand, rel=1e-5)


def test_ulrl(compose_config, images: Resident, make_runtime, monkeypatch) -> None:
    """Rows that moved by 10, 30 and 20 stand out; the largest two are taken, largest first."""
    method = build("ulrl", compose_config)
    network = suspect(classes=10).network

    def forget(forgetful: Normalized, *_: Any, **__: Any) -> None:
        by = torch.tensor([1.0, 1.1, 10, 0.9, 1, 30, 1.2, 20, 1, 0.8])
        head = classifier(forgetful)
        head.weight.data += by[:, None] / head.in_features

    monkeypatch.setattr("defenses.ulrl.unlearn", forget)
    data = granted(images, fraction=0.1)
    assert method.suspicious(network, data, make_runtime()) == [5, 7]
    before = classifier(network).weight.detach().clone()
    runtime = make_runtime()
    monkeypatch.setattr(method, "suspicious", lambda *_: [])
    training(method, copy.deepcopy(network), data, runtime, monkeypatch)
    assert "plain fine-tuning" in runtime.recorder.notes[-1]
    monkeypatch.undo()
    monkeypatch.setattr("defenses.ulrl.unlearn", forget)
    t = training(method, network, data, make_runtime(), monkeypatch)
    head, batch = classifier(network), next(iter(t.batches))
    total = float(sum(cross_entropies(network(batch.images), batch.labels))) / len(batch.images)
    for k in (5, 7):
        a, b = head.weight[k].detach(), before[k]
        total += method.alpha * float((a * b).sum() / (a.norm() * b.norm()))
    assert t.loss(network, batch).item() == pytest.approx(total, rel=1e-5)


def test_rnp(compose_config, images: Resident, make_runtime, monkeypatch) -> None:
    method, network = build("rnp", compose_config, selection="fixed"), suspect().network
    monkeypatch.setattr("defenses.rnp.unlearn", lambda *_, **__: 0.2)
    t = training(method, network, granted(images, fraction=0.1), make_runtime(), monkeypatch)
    batch = next(iter(t.batches))
    logits = t.network.eval()(batch.images)
    hand = method.alpha * float(sum(cross_entropies(logits, batch.labels))) / len(logits)
    assert t.loss(t.network, batch).item() == pytest.approx(hand, rel=1e-5)
    tuned = {n.split(".")[-1] for n, p in t.network.named_parameters() if p.requires_grad}
    assert tuned == {"mask"}


def test_bait(compose_config, images: Resident, make_runtime, monkeypatch) -> None:
    """Trap and Replace, stage 1: CE + 10 MSE + TV of the picture that the decoder draws."""
    method = build("trap_and_replace", compose_config)
    t = training(method, suspect().network, rich(images), make_runtime(), monkeypatch)
    batch, seen = next(iter(t.batches)), []
    handle = t.beside.register_forward_hook(lambda _, __, picture: seen.append(picture.detach()))
    loss = t.loss(t.network.eval(), batch).item()
    handle.remove()
    drawn = seen[0]
    ce = float(sum(cross_entropies(t.network(batch.images), batch.labels))) / len(drawn)
    down = (drawn[:, :, 1:] - drawn[:, :, :-1]).square().sum()
    right = (drawn[..., 1:] - drawn[..., :-1]).square().sum()
    mse = (drawn - batch.images).square().mean()
    hand = ce + 10 * float(mse) + float(down + right) / drawn.numel()
    assert loss == pytest.approx(hand, rel=1e-4)


def trainings(
    method: Any,
    network: Normalized,
    data: DefenderData,
    runtime: Any,
    patch: pytest.MonkeyPatch,
    after: Any = lambda name, network: None,
) -> dict[str, SimpleNamespace]:
    """What a defense of several trainings gives each of them, by role; none of them happens.

    Args:
        after: called with role and network in the place of a training.
    """
    found: dict[str, SimpleNamespace] = {}

    def grab(network: nn.Module, batches: Any, schedule: Any, *, role: str, **more: Any) -> str:
        found[role] = SimpleNamespace(network=network, batches=batches, role=role, **more)
        return role

    patch.setattr("dhbe.training.runtime.Supervised", grab)
    patch.setattr(
        "dhbe.training.runtime.Runtime.fit",
        lambda _, role, *__, **___: after(role, found[role].network),
    )
    method.repair(network.eval(), data, runtime)
    return found


def mean_cross_entropy(network: nn.Module, x: Tensor, y: Tensor) -> float:
    return float(sum(cross_entropies(network(x), y))) / len(x)


def test_ft_sam(compose_config, images: Resident, make_runtime, monkeypatch) -> None:
    """Label-smoothed cross-entropy at w + rho w^2 g / || |w| g ||, g by one pass per image."""
    method, network = build("ft_sam", compose_config, rho=0.5), suspect().network
    t = training(method, network, granted(images, fraction=0.1), make_runtime(), monkeypatch)
    batch = next(iter(t.batches))
    x, y = batch.images, batch.labels
    weights = list(network.parameters())

    def smoothed(network: nn.Module) -> Tensor:
        log_p = network(x).log_softmax(dim=1)
        goal = torch.full_like(log_p, 0.1 / 3)  # official: the three other classes share it
        goal[torch.arange(len(y)), y] = 0.9
        return -(goal * log_p).sum(dim=1).mean()

    slopes = torch.autograd.grad(smoothed(network), weights)
    squares = sum((w.detach() * g).square().sum() for w, g in zip(weights, slopes, strict=True))
    loss = t.loss(network, batch).item()
    with torch.no_grad():
        for w, g in zip(weights, slopes, strict=True):
            w.add_(0.5 * w.square() * g / squares.sqrt())
    assert loss == pytest.approx(smoothed(network).item(), rel=1e-4)


def test_neural_cleanse(compose_config, images: Resident, make_runtime, monkeypatch) -> None:
    """Classes with small masks are flagged; a share of the images wears each of their triggers."""
    method = build("neural_cleanse", compose_config, share=0.25, outlier=1.3)
    sizes = [11.0, 10.0, 1.0, 8.0]  # lower median 8, MAD 2: 10 and 11 lie above, 1 below
    pattern = torch.rand(1, 3, 16, 16)
    monkeypatch.setattr(
        method,
        "reverse",
        lambda _, __, k, ___: (torch.full((1, 1, 16, 16), sizes[k] / 256), pattern),
    )
    runtime, network = make_runtime(), suspect().network
    t = training(method, network, granted(images, fraction=0.1), runtime, monkeypatch)
    assert runtime.recorder.suspected == [2]
    assert runtime.recorder.pictures["triggers_found"].shape == (4, 3, 16, 16)
    clean, given = granted(images, fraction=0.1).clean().resident(), t.batches.images
    assert len(given) == len(clean) == 40
    assert given.labels.bincount().tolist() == [10] * 4, "true labels"
    own = {x.numpy().tobytes(): x for x in clean.images}
    kept = [x for x in given.images if x.numpy().tobytes() in own]
    assert len(kept) == 30
    rest = [x for k, x in own.items() if k not in {v.numpy().tobytes() for v in kept}]
    worn = [((1 - 1 / 256) * x / 255 + pattern[0] / 256) * 255 for x in rest]
    for x, label in zip(given.images[30:], given.labels[30:], strict=True):
        near = [i for i, w in enumerate(worn) if (w - x).abs().max() < 1.001]
        assert len(near) == 1
        assert (
            label == clean.labels[[torch.equal(c, rest[near[0]]) for c in clean.images].index(True)]
        )
    two = method.stamped(clean, [(torch.zeros(1, 1, 16, 16), pattern)] * 2, runtime)
    assert len(two) == 30 + 2 * 10, "each flagged class stamps the same share anew"


@pytest.mark.parametrize("how", ["unlearning", "bn_cleaning", "bn_unlearning"])
def test_cetf_repairs(how: str, compose_config, images, make_runtime, monkeypatch) -> None:
    method, network = build("cetf", compose_config, repair_with=how), suspect().network
    where = torch.zeros(16, 16, dtype=torch.bool)
    where[2:5, 3:7] = True
    trigger = Found(pixels=torch.rand(3, 16, 16) * where, where=where, target=1)
    monkeypatch.setattr(method, "detect", lambda *_: [trigger])
    runtime = make_runtime()
    t = training(method, network, rich(images), runtime, monkeypatch)
    assert runtime.recorder.suspected == [1]
    batch = next(iter(t.batches))
    x, y = batch.images, batch.labels
    stamped = x.clone()
    stamped[:, :, 2:5, 3:7] = trigger.pixels[:, 2:5, 3:7]
    clean, worn = (mean_cross_entropy(network, v, y) for v in (x, stamped))
    hand = clean if how == "bn_cleaning" else (clean + worn) / 2
    assert t.loss(network, batch).item() == pytest.approx(hand)
    tuned = {type(m) for m in network.modules() for p in m.parameters(False) if p.requires_grad}
    assert (tuned == {nn.BatchNorm2d}) == (how != "unlearning")


def test_abl(compose_config, images: Resident, make_runtime, monkeypatch) -> None:
    """Flooding at gamma; the images with the lowest loss are isolated, and only they unlearned."""
    method = build("abl", compose_config, share=0.1)
    runtime = make_runtime()
    found = trainings(method, suspect().network, rich(images), runtime, monkeypatch)
    assert list(found) == ["isolate", "learn", "unlearn"]
    plain = [t.batches.spec.augmentation for t in found.values()]
    assert plain == ["none", "crop_flip", "none"], "as in the official code"
    network = found["isolate"].network.eval()
    batch = next(iter(found["isolate"].batches))
    x, y = batch.images, batch.labels
    mean = mean_cross_entropy(network, x, y)
    for gamma in (0.5 * mean, 2 * mean):
        method.gamma = gamma
        held = found["isolate"].loss(network, batch).item()
        assert held == pytest.approx(abs(mean - gamma) + gamma)
    assert found["learn"].loss(network, batch).item() == pytest.approx(mean)
    assert found["unlearn"].loss(network, batch).item() == pytest.approx(-mean)
    given = found["isolate"].batches.images
    each = torch.stack(cross_entropies(network(given.images / 255), given.labels))
    parts = [found[role].batches.images for role in ("unlearn", "learn")]
    isolated = round(0.1 * len(given))
    assert [len(p) for p in parts] == [isolated, len(given) - isolated]
    easy = {p.numpy().tobytes() for p in given.images[each.argsort()[:isolated]]}
    assert {p.numpy().tobytes() for p in parts[0].images} == easy
    assert torch.equal(
        given.subset(torch.tensor(runtime.recorder.isolated)).images, parts[0].images
    )
    counts = parts[0].labels.bincount(minlength=4).tolist()
    said = ", ".join(f"{n} of class {k}" for k, n in enumerate(counts) if n)
    assert f"isolated {isolated} images ({said}; median loss " in runtime.recorder.notes[-1]
    indicator = torch.zeros(len(given), dtype=torch.int8)
    indicator[runtime.recorder.isolated[:3]] = POISON
    found_poison = isolation(runtime.recorder.isolated, indicator)
    assert found_poison == {"isolated": {"images": isolated, "poison": 3}}
    assert isolation(None, indicator) == isolation([1], indicator[:0]) == {}
    assert not {p.numpy().tobytes() for p in parts[1].images} & easy


def test_nad(compose_config, images: Resident, make_runtime, monkeypatch) -> None:
    """CE + sum of beta times the mean squared difference of both networks' attention maps."""

    def taught(role: str, network: nn.Module) -> None:
        if role == "teacher":
            for p in network.parameters():
                p.data.mul_(1.2)

    method, network = build("nad", compose_config), suspect().network
    method.betas = [3.0, 5.0]
    data = granted(images, fraction=0.1)
    found = trainings(method, network, data, make_runtime(), monkeypatch, taught)
    batch = next(iter(found["student"].batches))
    maps = []
    for net in (network, found["teacher"].network):
        for stage in net.network.stages:
            seen: list[Tensor] = []
            handle = stage.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
            net(batch.images)
            handle.remove()
            a = seen[0].detach().square().sum(dim=1)
            maps.append(torch.stack([m / m.square().sum().sqrt() for m in a]))
    hand = mean_cross_entropy(network, batch.images, batch.labels)
    hand += 3 * float((maps[0] - maps[2]).square().mean())
    hand += 5 * float((maps[1] - maps[3]).square().mean())
    loss = found["student"].loss(network, batch).item()
    assert loss == pytest.approx(hand, rel=1e-5)
    assert loss > mean_cross_entropy(network, batch.images, batch.labels) + 1e-4


def test_anp(compose_config, images: Resident, make_runtime, monkeypatch) -> None:
    """alpha CE(masks) + (1 - alpha) CE with gamma (m + d) and beta (1 + e)."""
    method, network = build("anp", compose_config, selection="fixed"), suspect().network
    plain = copy.deepcopy(network)

    def disturb(_: nn.Module, disturbed: list[Scale], *__: Any) -> None:
        for scale in disturbed:
            scale.noise = torch.full_like(scale.noise, 0.3)

    monkeypatch.setattr(method, "disturb", disturb)
    t = training(method, network, granted(images, fraction=0.1), make_runtime(), monkeypatch)
    for scale in scales(network):
        scale.mask.data.fill_(0.8 if scale.mask.requires_grad else 1.0)
    batch = next(iter(t.batches))
    found = []
    for factor, shift in ((0.8, 1.0), (0.8 + 0.3, 1 + 0.3)):
        net = copy.deepcopy(plain)
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.data *= factor
                m.bias.data *= shift
        found.append(mean_cross_entropy(net, batch.images, batch.labels))
    hand = method.alpha * found[0] + (1 - method.alpha) * found[1]
    assert t.loss(network, batch).item() == pytest.approx(hand, rel=1e-5)


def test_adversarial_fine_tuning(compose_config, images, make_runtime, monkeypatch) -> None:
    """PGD images of the network in eval mode at first, then the clean ones."""
    method, network = build("aft", compose_config), suspect().network
    method.adversarial_epochs = 1
    worse = torch.rand(8, 3, 16, 16)
    monkeypatch.setattr("defenses.pbe.pgd", lambda net, *_, **__: worse + float(net.training))
    t = training(method, network, granted(images, fraction=0.1), make_runtime(), monkeypatch)
    assert t.batches.spec.augmentation == "crop_flip_rotate", "as in the official code"
    for epoch, hard in ((0, True), (1, False)):
        t.batches.set_epoch(epoch)
        batch = next(iter(t.batches))
        loss = t.loss(network.train(), batch).item()
        x = worse if hard else batch.images
        assert loss == pytest.approx(mean_cross_entropy(network, x, batch.labels), rel=1e-4)


def predictions(logits: Tensor) -> Tensor:
    """Probabilities (B, K) in double."""
    return logits.detach().double().softmax(dim=1)


@torch.no_grad()
def undecided(network: nn.Module) -> nn.Module:
    """The same network, which now gives noise every class in turn."""
    logits = network.eval()(torch.rand(64, 3, 16, 16))
    classifier(network).bias -= logits.mean(0)
    classifier(network).weight *= 20
    return network


def test_sau(compose_config, images: Resident, make_runtime, monkeypatch) -> None:
    """Where the suspect is fooled, its answer is denied; elsewhere only the clean term counts."""
    method = build("sau", compose_config, robust=0.5, shared=2.0)
    network = undecided(suspect().network)
    old, data = copy.deepcopy(network), granted(images, fraction=0.1)
    t = training(method, network, data, make_runtime(), monkeypatch)
    assert t.train_mode is False
    assert t.batches.spec.augmentation == "none"
    with torch.no_grad():
        classifier(network).weight.add_(0.5 * torch.randn(classifier(network).weight.shape))
    batch = next(iter(t.batches))
    x, y = batch.images, batch.labels
    moved = x + 3 * torch.rand_like(x).sub(0.5)
    monkeypatch.setattr(method, "perturbation", lambda *_: moved - x)
    before, answer, p = old(x).argmax(1), old(moved).argmax(1), predictions(network(moved))
    denied = [
        -math.log(1 - float(p[i, k]))
        for i, k in enumerate(answer.tolist())
        if k not in (int(y[i]), int(before[i]))
    ]
    assert 0 < len(denied) < len(y), "otherwise this says nothing"
    hand = mean_cross_entropy(network, x, y) + 0.5 * mean_cross_entropy(network, moved, y)
    assert t.loss(network, batch).item() == pytest.approx(hand + 2 * sum(denied) / len(y), rel=1e-4)


def test_sau_moves_images_towards_one_wrong_answer_of_both(compose_config) -> None:
    """One step from d = epsilon, along the sign of the gradient of the objective by its formula."""
    method = build("sau", compose_config, pgd_steps=1, adversarial=0.3)
    old, new = undecided(suspect().network), undecided(suspect(seed=1).network)
    x, y = torch.rand(8, 3, 16, 16), torch.arange(8) % 4
    own, before = new(x).argmax(1), old(x).argmax(1)
    found = method.perturbation(new, old, x, y, own, before)
    delta = torch.full_like(x, 0.2).requires_grad_(True)
    total = torch.zeros(())
    for i in range(8):
        moved = (x + delta)[i : i + 1]
        p, q = (net(moved).softmax(dim=1)[0] for net in (new, old))
        k, j = int(p.argmax()), int(q.argmax())
        if k == own[i]:
            total = total + 0.3 / 2 * p[y[i]].log() / 8
        if j == before[i]:
            total = total + 0.3 / 2 * q[y[i]].log() / 8
        if not (k != own[i] and j != before[i] and k == j):
            mean = (p + q) / 2
            share = (p * (p / mean).log() + q * (q / mean).log()).sum() / 2
            total = total + share / 8
    (gradient,) = torch.autograd.grad(total, delta)
    hand = (0.2 - 0.2 * gradient.sign()).clamp(-0.2, 0.2)
    clear = gradient.abs() > 1e-7  # rounding decides about the others
    assert clear.float().mean() > 0.5
    torch.testing.assert_close(found[clear], hand[clear])


def test_npd(compose_config, images: Resident, make_runtime, monkeypatch) -> None:
    """CE, the own answer kept and two wrong classes denied on moved images, by a frozen network."""
    weights = {"clean": 2.0, "kept": 0.3, "wrong": 0.4, "target": 0.5}
    method, network = build("npd", compose_config, **weights), suspect().network
    data = granted(images, fraction=0.1)
    t = trainings(method, network, data, make_runtime(), monkeypatch)["student"]
    assert t.train_mode is False
    assert not any(w.requires_grad for w in network.parameters())
    assert {n for n, _ in t.network.named_parameters()} == {
        "mix.weight",
        "norm.weight",
        "norm.bias",
    }
    batch, seen = next(iter(t.batches)), []
    x, y = batch.images, batch.labels
    moved = torch.rand_like(x)
    monkeypatch.setattr(method, "moved", lambda _, __, target: seen.append(target) or moved)
    loss = t.loss(t.network, batch).item()
    clean, p = predictions(network(x)), predictions(network(moved))
    hand = 2 * mean_cross_entropy(network, x, y)
    for i, label in enumerate(y.tolist()):
        rest = [k for k in range(4) if k != label]
        goal = max(rest, key=lambda k: float(clean[i, k]))
        assert int(seen[0][i]) == goal
        found = max(rest, key=lambda k: float(p[i, k]))
        hand -= 0.3 * math.log(p[i, clean[i].argmax()]) / len(y)
        hand -= 0.4 * math.log(1 - p[i, found]) / len(y)
        hand -= 0.5 * math.log(1 - p[i, goal]) / len(y)
    assert loss == pytest.approx(hand, rel=1e-4)


def test_npd_moves_images_inside_a_ball(compose_config) -> None:
    method = build("npd", compose_config, pgd_steps=1, epsilon=1.0)
    network, x = suspect().network.eval().requires_grad_(False), torch.rand(4, 3, 16, 16)
    target = (network(x).argmax(1) + 1) % 4
    found = method.moved(network, x, target)
    free = x.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(F.cross_entropy(network(free), target), free)
    step = -0.1 * slope.sign()
    length = step.flatten(1).norm(dim=1)
    assert length.min() > 1, "the ball ends the step"
    scale = 1 / length
    hand = (x + scale[:, None, None, None] * step).clamp(0, 1)
    torch.testing.assert_close(found, hand)
    small = build("npd", compose_config, pgd_steps=2, epsilon=0.5).moved(network, x, target)
    assert (small - x).flatten(1).norm(dim=1).max() <= 0.5 + 1e-5


def test_tsbd(compose_config, images: Resident, make_runtime, monkeypatch) -> None:
    """(1 - alpha) g + alpha g', g' the gradient at weights moved along g, each by its own norm."""
    method, network = build("tsbd", compose_config, r=0.3, alpha=0.6), suspect().network
    monkeypatch.setattr("defenses.tsbd.unlearn", lambda *_, **__: 0.1)
    monkeypatch.setattr("defenses.tsbd.reinitialise", lambda *_, **__: 0)
    t = training(method, network, granted(images, fraction=0.1), make_runtime(), monkeypatch)
    batch = next(iter(t.batches))
    x, y = batch.images, batch.labels
    weights = list(network.parameters())
    found = torch.autograd.grad(t.loss(network, batch), weights)
    here = torch.autograd.grad(F.cross_entropy(network(x), y), weights)
    moved = copy.deepcopy(network)
    with torch.no_grad():
        for w, g in zip(moved.parameters(), here, strict=True):
            w.add_(0.3 * g / g.square().sum().sqrt())
    there = torch.autograd.grad(F.cross_entropy(moved(x), y), list(moved.parameters()))
    for total, g, h in zip(found, here, there, strict=True):
        torch.testing.assert_close(total, 0.4 * g + 0.6 * h, atol=1e-5, rtol=1e-3)


def test_seam(compose_config, images: Resident, make_runtime, monkeypatch) -> None:
    """A few images with labels that are never the true ones; then all with their own."""
    method, network = build("seam", compose_config, share=0.25), suspect().network
    data = granted(images, fraction=0.1)
    found = trainings(method, network, data, make_runtime(), monkeypatch)
    assert [(r, len(t.batches.images)) for r, t in found.items()] == [
        ("forget", 10),
        ("recover", 40),
    ]
    batch = next(iter(found["recover"].batches))
    own = mean_cross_entropy(network, batch.images, batch.labels)
    assert found["recover"].loss(network, batch).item() == pytest.approx(own)
    monkeypatch.setattr("defenses.seam.wrong", lambda labels, *_: (labels + 1) % 4)
    next_ones = mean_cross_entropy(network, batch.images, (batch.labels + 1) % 4)
    assert found["forget"].loss(network, batch).item() == pytest.approx(next_ones)


def test_wrong_labels_are_drawn_evenly_among_the_others() -> None:
    labels = torch.arange(4).repeat(1000)
    drawn = wrong(labels, 4, generator(0))
    counts = torch.zeros(4, 4, dtype=torch.long)
    counts.index_put_((labels, drawn), torch.tensor(1), accumulate=True)
    assert counts.diagonal().tolist() == [0] * 4
    assert counts[~torch.eye(4, dtype=torch.bool)].sub(1000 / 3).abs().max() < 60
