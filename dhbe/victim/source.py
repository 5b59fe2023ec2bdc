"""Sources of the suspicious network: one protocol, one class per origin."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from dhbe.config import schema as config
from dhbe.contracts.attack import Attack, NoAttack
from dhbe.core.errors import got
from dhbe.core.rng import fork
from dhbe.core.types import DataSpec
from dhbe.data import Splits
from dhbe.models import Normalized
from dhbe.models.interface import channels_last, prepared
from dhbe.training.runtime import Runtime
from dhbe.victim.store import Victim

OWN = "dhbe.models.own.own"
"""``_target_`` of a user's own network, which may give more than logits."""


@dataclass(frozen=True, kw_only=True)
class VictimRequest:
    """Which victim is wanted, and what there is to make it from.

    Attributes:
        config: of the whole run, resolved.
        splits: images to train on; None without data.
        runtime: of the run; a training takes one of its own from it.
    """

    config: dict[str, Any]
    spec: DataSpec
    attack: Attack
    splits: Splits | None
    runtime: Runtime

    def network(self) -> Normalized:
        """The config's network with freshly drawn weights."""
        return build_network(self.config, self.spec, self.runtime.derive("network"))

    def without_attack(self) -> VictimRequest:
        """The clean network of the same recipe: surrogate and clean baseline of an attack."""
        return replace(self, attack=no_attack(self.spec))


class VictimSource(ABC):
    """Source of a victim; methods other than ``obtain`` default to those of trained victims."""

    trains: ClassVar[bool] = False
    """Whether victims are trained here, so that there is a clean network of the same recipe."""
    weights_only: ClassVar[bool] = True
    """Whether weights are all that a defense may change, because other code will load them."""
    assumed: list[str] = []  # noqa: RUF012 - replaced, never changed
    """What was not said of the network and was assumed, in words."""

    def check(self, attack: Attack) -> None:
        """Refuse, before anything is read, an attack whose victim cannot come from here.

        Raises:
            ConfigError: the trigger is made together with a victim, which this is not.
        """
        if attack.active and not attack.portable:
            raise got(
                "attack",
                f"{type(attack).__module__}.{type(attack).__name__}",
                "an attack whose trigger its options tell; this one's is made together with a "
                "victim, and a checkpoint does not bring it",
                "trigger=PICTURE stands for a known trigger",
            )

    def check_folder(self, folder: Path) -> None:
        """Refuse a result folder whose publication would destroy what the victim comes from.

        Raises:
            ConfigError: it would.
        """

    @abstractmethod
    def obtain(self, request: VictimRequest) -> Victim:
        """The victim, in eval mode.

        Raises:
            ConfigError: the request lacks what this source needs.
            ArtefactError: a file is damaged, or not what it should be.
        """

    def write_back(self, network: Normalized, folder: Path) -> Path | None:
        """The purified network beside the result, in the form that the victim had, if in a file.

        Raises:
            ArtefactError: that form cannot hold it, or its origin has changed.
        """
        del network, folder
        return None


def untrained(network: Normalized, attack: Attack) -> Victim:
    """Victim that was not made here: no poisoned images, curves or seconds are known of it."""
    return Victim(
        network=network.eval(),
        attack=attack,
        indicator=torch.zeros(0, dtype=torch.int8),
        seconds=0.0,
        cached=True,
        curves=[],
        work=None,
    )


def build_network(tree: dict[str, Any], spec: DataSpec, seed: int) -> Normalized:
    """Freshly initialised network with normalisation, channels last in memory."""
    with fork(seed):
        network: nn.Module = config.build(
            tree["model"],
            classes=spec.classes,
            channels=spec.channels,
            image_size=spec.image_size,
        )
    if tree["model"]["_target_"] == OWN:
        prepared(network, spec)
    return channels_last(Normalized(network, spec))


def no_attack(spec: DataSpec) -> NoAttack:
    """Clean training."""
    return NoAttack(
        spec=spec,
        poison_rate=0.0,
        poison_count=0,
        cover_rate=0.0,
        target_class=0,
        target_rule="all_to_one",
        source_classes=[],
        pool="exclude_target",
        augmentation="crop_flip",
    )
