"""The loss that a defense really trains with, against the formula of its paper written out."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_defenses import build, granted, rich, suspect
from torch import Tensor, nn
from torch.nn import functional as F

from dhbe.data import DefenderData, Resident
from dhbe.masks import Scale
from dhbe.models import Normalized
from dhbe.models.dataflow import classifier


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

    patch.setattr(f"{type(method).__module__}.Supervised", grab)
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
    rng, batch = t.batches.noise, next(iter(t.batches))
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
