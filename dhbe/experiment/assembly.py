"""From a resolved config to the objects that it names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dhbe.config import schema as config
from dhbe.contracts.attack import Attack
from dhbe.contracts.defense import Defense
from dhbe.core.errors import got
from dhbe.core.types import DataSpec
from dhbe.data import Budget, Data
from dhbe.evaluation.evidence import Probe
from dhbe.training.trainer import TrainerConfig
from dhbe.victim.source import VictimSource
from dhbe.victim.train import TrainedVictim


@dataclass(kw_only=True)
class Parts:
    """The objects that a config names."""

    data: Data
    attack: Attack
    defense: Defense
    budget: Budget
    trainer: TrainerConfig
    source: VictimSource
    probe: Probe | None

    @property
    def spec(self) -> DataSpec:
        """What everyone may know of the data."""
        return self.data.spec


def assemble(tree: dict[str, Any], source: VictimSource | None = None) -> Parts:
    """Build all parts and check that they fit; of data sets nothing is read.

    Args:
        tree: resolved completely.
        source: takes the place of the config's ``victim``.

    Raises:
        ConfigError: unknown, ill-typed or missing values, or an impossible combination.
    """
    config.validate(tree)
    data: Data = config.build(tree["data"])
    budget: Budget = config.build(tree["budget"])
    defense: Defense = config.build(tree["defense"])
    defense.check(budget)
    defense.fits(data.spec)
    attack: Attack = config.build(tree["attack"], spec=data.spec)
    if defense.selection == "oracle" and not attack.active:
        allowed = "fixed or validation with attack=none: an oracle reads the attack's success rate"
        raise got("defense.selection", "oracle", allowed)
    if source is None:
        source = victim_source(tree["victim"])
    source.check(attack)
    if tree["clean_baseline"] and not source.trains:
        raise got("clean_baseline", True, "false where no victim is trained: no recipe to repeat")
    return Parts(
        data=data,
        attack=attack,
        defense=defense,
        budget=budget,
        trainer=config.build(tree["trainer"]),
        source=source,
        probe=config.build(tree["probe"]) if "probe" in tree else None,
    )


def victim_source(node: dict[str, Any]) -> VictimSource:
    """The source that ``victim`` names; a bare schedule, as most configs have it, is trained by."""
    built = config.build(node)
    return built if isinstance(built, VictimSource) else TrainedVictim(built)
