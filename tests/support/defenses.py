"""Defenses on a small suspect, with what their budget grants."""

from __future__ import annotations

import torch
from hydra.utils import instantiate
from torch import nn

from dhbe.config.schema import plain
from dhbe.contracts.defense import Defense
from dhbe.core.rng import generator
from dhbe.core.types import Suspect
from dhbe.data import Budget, DefenderData, Resident
from dhbe.models.dataflow import classifier
from tests.conftest import names
from tests.support.fixtures import make_spec, tiny_resnet

DEFENSES = names("defense")


SHORT = {
    "epochs": 2,
    "iterations": 1,
    "batch_size": 8,
    "latent": 4,
    "width": 2,
    "patch_latent": 4,
    "patch_width": 2,
    "steps": 2,
    "population": 8,
    "generations": 2,
    "verification": 4,
    "backgrounds": 3,
    "inputs": 2,
    "passes": 1,
    "count": 16,
    "per_class": 2,
    "judged": 8,
    "head_start": 1,
    "periods": 2,
    "adversarial_batches": 2,
    "pgd_steps": 2,
    "fixed_point_steps": 2,
}
"""Options that only cost time, at every depth of a config."""


AT_MOST = {"copies": 2, "warm_up": 2}
"""Likewise, where 0 means none."""


def shrink(node):
    """The same node with small values for these options."""
    if not isinstance(node, dict):
        return node
    least = {k: min(v, AT_MOST[k]) for k, v in node.items() if k in AT_MOST}
    return {k: SHORT.get(k, shrink(v)) for k, v in node.items()} | least


def build(name: str, compose_config, **options) -> Defense:
    node = shrink(plain(compose_config(f"defense={name}"))["defense"])
    if "betas" in node and "teacher_schedule" in node:
        node["betas"] = [1.0, 1.0]  # the test network has two stages
    return instantiate(node | options, _convert_="all")


def suspect(seed: int = 0, **changes) -> Suspect:
    spec = make_spec(**changes)
    torch.manual_seed(seed)
    wrapped = tiny_resnet(spec, [16, 24])
    wrapped(torch.rand(32, *spec.shape))  # statistics of something
    return Suspect(network=wrapped.eval(), architecture="tiny", spec=spec)


def granted(images: Resident, **budget) -> DefenderData:
    return DefenderData(Budget(name="test", **budget), pool=images, train_size=400, seed=0)


def white_corner(x, y, index):
    """A trigger for incoming and poisoned images."""
    out = x.clone()
    out[:, :, -3:, -3:] = 1
    return out


def rich(images: Resident) -> DefenderData:
    """Everything that any defense may ask for."""
    stamped = white_corner(images.images / 255, None, None).mul(255).byte()
    poisoned = Resident(
        torch.cat([images.images, stamped[:8]]), torch.cat([images.labels, images.labels[:8] * 0])
    )
    return DefenderData(
        Budget(name="test", fraction=0.1, poisoned=True, incoming=4),
        pool=images,
        train_size=400,
        seed=0,
        poisoned=poisoned,
        trigger=white_corner,
    )


def batch(n: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    rng = generator(3)
    return torch.rand(n, *make_spec().shape, generator=rng), torch.arange(n) % 4


@torch.no_grad()
def self_labelled(images: Resident, network: nn.Module) -> Resident:
    """Images labelled by a network itself, so that it is always right."""
    head = classifier(network)
    logits = network(images.images / 255)
    head.bias -= logits.mean(0)  # so that every class occurs
    return Resident(images.images, network(images.images / 255).argmax(1))
