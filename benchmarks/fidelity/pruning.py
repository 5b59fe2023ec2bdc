"""Defenses that prune or mask."""

from __future__ import annotations

import contextlib
import copy
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.fidelity.official import Official, compare
from benchmarks.fidelity.ours import (
    SPEC,
    Given,
    apart,
    batches,
    defense,
    network,
    repaired,
    scattered,
    twin,
    weights,
)
from defenses.otbr import fuse
from defenses.tsbd import reinitialise
from dhbe.methods.masks import batch_norms
from dhbe.methods.statistics import outliers
from dhbe.models import Normalized
from dhbe.models.dataflow import classifier
from dhbe.models.preact import WideResNet
from dhbe.models.shortcuts import filters

CE = nn.CrossEntropyLoss()


def masks_of(net: nn.Module, name: str = "neuron_mask") -> list[Tensor]:
    """The authors' masks."""
    return [value for key, value in net.named_parameters() if name in key]


def learned_masks(name: str, net: Normalized, given: Given, **options: Any) -> list[Tensor]:
    """The masks by which ANP or RNP prunes in the end."""
    with patch(f"defenses.{name}.prune_by_masks") as prune:
        repaired(defense(name, **options), net, given)
    found: list[Tensor] = prune.call_args.args[1]
    return found


@compare("clp", "channel-Lipschitzness-based-pruning/defense.py: CLP")
def clp(official: Official) -> float:
    """Weights of a residual network after pruning at u = 0.5, 1 and 2"""
    net, found = network((8, 12, 16)), []
    for u in (0.5, 1.0, 2.0):
        theirs = copy.deepcopy(net)
        official.CLP(theirs, u)
        ours = repaired(defense("clp", u=u), net, batches(1, 2))
        found.append(apart(weights(ours), weights(theirs)))
    return max(found)


@compare(
    "anp",
    "ANP_backdoor/optimize_mask_cifar.py: mask_train, include_noise, exclude_noise, sign_grad, "
    "clip_mask",
    "ANP_backdoor/models/anp_batchnorm.py: NoisyBatchNorm2d, NoisyBatchNorm1d",
)
def anp(official: Official) -> float:
    """Masks after three steps from the same noise"""
    net, given, method = network(), batches(3, 8), defense("anp")
    ours = learned_masks("anp", net, given, epochs=1)
    theirs = twin(net, nn.BatchNorm2d, official.NoisyBatchNorm2d)
    step = iter(range(1, 4))

    def reset(model: nn.Module, rand_init: bool) -> None:
        rng = torch.Generator().manual_seed(next(step))
        for name in ("neuron_noise", "neuron_noise_bias"):
            for noise in (p for n, p in model.named_parameters() if n.endswith(f".{name}")):
                drawn = 2 * torch.rand(noise.shape, generator=rng) - 1
                noise.data.copy_(method.epsilon * drawn)

    kinds = {k: official.space[k] for k in ("NoisyBatchNorm2d", "NoisyBatchNorm1d")}
    args = {"anp_eps": method.epsilon, "anp_steps": 1, "anp_alpha": method.alpha}
    official.space |= {"reset": reset, "models": SimpleNamespace(**kinds)}
    official.space["args"] = SimpleNamespace(**args)
    noises = torch.optim.SGD(masks_of(theirs, "neuron_noise"), lr=method.epsilon)
    official.mask_train(theirs, CE, masks_optimizer(theirs), noises, given)
    return apart(ours, masks_of(theirs))


def masks_optimizer(net: nn.Module, rate: float = 0.2, momentum: float = 0.9) -> Any:
    """The optimiser that ANP, RNP and NFT give their masks."""
    return torch.optim.SGD(masks_of(net), lr=rate, momentum=momentum)


@compare(
    "rnp",
    "RNP/main.py: train_step_unlearning, train_step_recovering, clip_mask",
    "RNP/models/mask_batchnorm.py: MaskBatchNorm2d",
)
def rnp(official: Official) -> float:
    """Masks after two epochs of unlearning (ours without clipping) and two of recovery"""
    net, given = network(), batches(2, 16)
    method = defense("rnp")
    ours = learned_masks("rnp", net, given, epochs=2, clip=1e9)
    theirs = copy.deepcopy(net)
    optimizer = method.unlearn_schedule.optimizer(theirs)
    for _ in range(2):
        official.train_step_unlearning(None, theirs, CE, optimizer, given)
    theirs = twin(theirs, nn.BatchNorm2d, official.MaskBatchNorm2d)
    optimizer = masks_optimizer(theirs)
    for _ in range(2):
        args = SimpleNamespace(alpha=method.alpha)
        official.train_step_recovering(args, theirs, CE, optimizer, given)
    return apart(ours, masks_of(theirs))


@compare(
    "awm",
    "AWM/main.py: mask_train, clip_mask, Regularization",
    "AWM/models/maskedconv.py: MaskedConv2d",
)
def awm(official: Official) -> float:
    """Masked weights after one round: perturbation, its scaling, two steps on the masks"""
    net, given, norm = network(), batches(2, 8), 5.0
    method = defense("awm", epochs=1, norm=norm)
    ours = repaired(method, net, given)
    theirs = twin(net, nn.Conv2d, official.MaskedConv2d)
    layers = [m for m in theirs.modules() if isinstance(m, official.MaskedConv2d)]
    for layer in layers:
        layer.include_mask()
    args = {"trigger_norm": norm, "alpha": method.alpha, "gamma": method.sparsity}
    official.space["args"] = SimpleNamespace(**args)
    optimizer = torch.optim.Adam(masks_of(theirs, "mask"), lr=method.schedule.learning_rate)
    official.mask_train(theirs, CE, optimizer, given)
    convolutions = [m for m in ours.modules() if isinstance(m, nn.Conv2d)]
    return apart([m.weight for m in convolutions], [m.weight * m.mask for m in layers])


@compare(
    "nft",
    "NFT-Augmented-Backdoor-Purification/src/Remove_Backdoor.py: NFT_Train, Regularization, "
    "mask_clip, mixup_data, mixup_criterion",
    "NFT-Augmented-Backdoor-Purification/src/networks/mask_filter.py: Masked_BN2d",
)
def nft(official: Official) -> float:
    """Masked weights of BatchNorm after three steps of mixup"""
    net, given = network(), batches(3, 10)
    method = defense("nft", epochs=1)
    ours = repaired(method, net, given)
    theirs = twin(net, nn.BatchNorm2d, official.Masked_BN2d)
    optimizer = masks_optimizer(theirs, method.schedule.learning_rate, method.schedule.momentum)
    args = SimpleNamespace(alpha=method.floor, beta=method.decay)
    for step, batch in enumerate(given, start=1):
        rng = torch.Generator().manual_seed(step)
        share = float(torch.rand((), generator=rng))
        order = torch.randperm(len(batch[0]), generator=rng)
        drawn = SimpleNamespace(beta=lambda *_, share=share: share)
        official.space["np"] = SimpleNamespace(random=drawn)
        with (
            patch("torch.randperm", return_value=order),
            contextlib.suppress(UnboundLocalError),  # its counters, after the step
        ):
            official.NFT_Train(args, 3.0, theirs, CE, optimizer, [batch])
    norms = [m for m in theirs.modules() if isinstance(m, official.Masked_BN2d)]
    masked = [m.weight * m.neuron_mask for m in norms]
    return apart([m.weight for m in batch_norms(ours, method="nft")], masked)


@compare("bnp", "NIPS2022_EP_BNP/defense.py: BNP, BatchNorm2d_gau")
def bnp(official: Official) -> float:
    """Scales of the BatchNorms after pruning at u = 1"""
    net, given = network((16, 24)), batches(1, 16)
    ours = repaired(defense("bnp", u=1.0, images=16), net, given)

    def get_model(model: str, classes: int, kind: Any = nn.BatchNorm2d) -> nn.Module:
        return twin(net, nn.BatchNorm2d, kind)

    official.space["get_model"] = get_model
    args = SimpleNamespace(model="", device="cpu")
    theirs = official.BNP(net.state_dict(), 1.0, given, args, 10)
    return apart(*([m.weight for m in batch_norms(n, method="bnp")] for n in (ours, theirs)))


@compare(
    "ep",
    "BackdoorBench/defense/ep.py: EP_defense, batch_entropy",
    "BackdoorBench/utils/defense_utils/dde/dde_model/dde_batchnorm.py: BatchNorm2d_DDE",
)
def ep(official: Official) -> float:
    """Weights after pruning at u = 1 by 64 images"""
    net, given = network((16, 24)), batches(1, 64)
    ours = repaired(defense("ep", u=1.0, images=64), net, given)
    theirs = twin(net, nn.BatchNorm2d, official.BatchNorm2d_DDE)
    official.EP_defense(theirs, 1.0, given, SimpleNamespace(device="cpu"))
    return apart(weights(ours), weights(theirs))


def named_changes(official: Official, net: nn.Module) -> tuple[list[Tensor], list[Any]]:
    """Random changes of the filters' weights, for us and as the authors list them."""
    names = official.get_layerName_from_type(net, "conv")
    moved = [torch.rand(len(f.weight), f.weight[0].numel()) for f in filters(net)]
    rows = [
        (name, i, float(row.sum()))
        for name, layer in zip(names, moved, strict=True)
        for i, row in enumerate(layer)
    ]
    return moved, rows


def wide() -> Normalized:
    """A random pre-activation network, whose shortcuts the authors know by their name."""
    torch.manual_seed(0)
    built = WideResNet(depth=10, widen=1, classes=10, channels=3, image_size=32)
    return scattered(Normalized(built, SPEC))


@compare("otbr", "OTBR/otbr.py: pruning, ot_fusion, to_probalility, get_layerName_from_type")
def otbr(official: Official) -> float:
    """Weights after pruning and fusion, shares 0.01, 0.1, 0.3, in single precision as theirs"""
    import ot

    official.space["ot"] = ot
    net, found = wide().float(), []
    moved, rows = named_changes(official, net)
    rows_down = sorted(rows, key=lambda row: row[2], reverse=True)
    for share in (0.01, 0.1, 0.3):
        ours, theirs, pruned = (copy.deepcopy(net) for _ in range(3))
        fuse(ours, [m.sum(1).float() for m in moved], share, 0.7)
        layers = official.pruning(pruned, int(len(rows) * share), rows_down)
        names = official.get_layerName_from_type(net, "conv")
        args = SimpleNamespace(device="cpu", lambda_=0.7)
        official.ot_fusion(args, theirs, pruned, layers, names, rows)
        found.append(apart(weights(ours), weights(theirs)))
    return max(found)


@compare("tsbd", "TSBD/tsbd.py: zero_reinit_weight, mixed_name, get_layerName_from_type")
def tsbd_zeroes(official: Official) -> float:
    """Weights after zeroing, neurons 0.15 and weights 0.7"""
    ours = wide()
    theirs = copy.deepcopy(ours)
    moved, rows = named_changes(official, ours)
    reinitialise(ours, moved, neurons=0.15, weights=0.7)
    each = {
        official.mixed_name(name, i): row.tolist()
        for (name, i, _), row in zip(rows, (r for m in moved for r in m), strict=True)
    }
    rows_down = sorted(rows, key=lambda row: row[2], reverse=True)
    official.zero_reinit_weight(theirs, int(0.15 * len(rows)), rows_down, each, 0.7)
    return apart(weights(ours), weights(theirs))


@compare("fine_pruning", "BackdoorBench/defense/fp.py: defense")
def fine_pruning(official: Official) -> float:
    """Order in which features are pruned, by their mean over two batches"""
    net, given = network((16, 24)), batches(2, 16)
    order: list[int] = []

    def choose(net: Normalized, _: Any, cut: Any, **__: Any) -> Any:
        head = classifier(net)
        for count in range(1, head.in_features + 1):
            cut(net, count / head.in_features)
            gone = (head.weight == 0).all(0).nonzero().flatten().tolist()
            order.extend(set(gone) - set(order))
        return 0.0, net

    with patch("defenses.fine_pruning.choose", choose):
        repaired(defense("fine_pruning", selection="fixed", epochs=1), net, given)
    found = official.excerpt(
        "if args.model == 'vit_b_16'",
        "seq_sort = ",
        args=SimpleNamespace(model="", device="cpu"),
        netC=net.network,
        trainloader=[(net.normalize(x), y) for x, y in given],
        clean_train_dataset_without_transform=given.dataset,
    )
    return sum(a != b for a, b in zip(order, found.seq_sort.tolist(), strict=True))


@compare("ulrl", "ULRL/defense/ulrl.py: defense")
def ulrl_rows(official: Official) -> float:
    """Flagged rows of 50 random lists of ten changes (number of lists that differ)"""
    differ = 0
    for _ in range(50):
        moved = torch.distributions.LogNormal(0.0, 1.5).sample((10,))
        found = official.excerpt(
            "median = torch.median", "neuron_indices = ", aggregate_changes_per_neuron=moved
        )
        differ += outliers(moved.numpy(), 3.5, side="above") != found.neuron_indices
    return differ
