"""Attacks, images and networks that are small enough for a test."""

from __future__ import annotations

import torch
from hydra.utils import instantiate

from attacks.badnets import BadNets
from dhbe.config.schema import plain
from dhbe.contracts.attack import Attack
from dhbe.core.rng import fork
from dhbe.data import Resident
from dhbe.models import Normalized
from tests.conftest import ROOT
from tests.support.fixtures import tiny_resnet

QUICK = {
    "steps": 2,
    "images": 8,
    "path": str(ROOT / "tests" / "trigger.png"),
    "widths": [8],
    "partners": 4,
    "schedule": {"epochs": 1, "batch_size": 4},
    "mask_schedule": {"epochs": 1, "batch_size": 4},
}
"""Smaller values for options that only cost time."""


def build(name: str, compose_config, spec, **options) -> Attack:
    node = plain(compose_config(f"attack={name}"))["attack"]
    for key in QUICK.keys() & node.keys():
        node[key] = node[key] | QUICK[key] if isinstance(node[key], dict) else QUICK[key]
    attack = instantiate(node | options, _partial_=True, _convert_="all")(spec=spec)
    assert isinstance(attack, Attack)
    return attack


def prepare(attack: Attack, train: Resident, runtime) -> torch.Tensor:
    """The attack gets what the victim's training would give it; returns the poison indicator."""
    indicator = attack.select(train.labels, runtime.rng("codes"))
    attack.prepare(train, indicator, runtime, tiny(attack.spec) if attack.needs_surrogate else None)
    attack.eval()
    return indicator


def tiny(spec) -> Normalized:
    """An untrained network."""
    with fork(0):
        return tiny_resnet(spec, [16, 16]).eval()


def batch(spec, n: int = 5, seed: int = 0):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (n, *spec.shape), generator=rng).float() / 255
    return x, torch.randint(0, spec.classes, (n,), generator=rng), torch.arange(n)


def badnets(spec, **options) -> BadNets:
    known = {
        "pattern": "square",
        "patch_size": 3,
        "margin": 0,
        "poison_rate": 0.1,
        "poison_count": 0,
        "cover_rate": 0.0,
        "target_class": 0,
        "target_rule": "all_to_one",
        "source_classes": [],
        "pool": "exclude_target",
        "augmentation": "crop_flip",
    }
    return BadNets(spec=spec, **(known | options))
