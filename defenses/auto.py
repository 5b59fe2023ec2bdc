"""Scan first and unlearn what it finds; otherwise prune by CLP, or play. Ours, data-free."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge

from dhbe.contracts.defense import Defense
from dhbe.core.errors import ConfigError
from dhbe.core.types import DataSpec
from dhbe.data import DefenderData
from dhbe.models import Normalized
from dhbe.models.dataflow import conv_bn_pairs
from dhbe.training.runtime import Runtime


class Auto(Defense):
    """``scan`` if it suspects a class; else ``prune``; ``game`` where neither applies.

    CLP removed the warps that the scan does not seek, and cost the clean networks that were tried
    less than the game (docs/results/real_networks.md).

    Args:
        scan: a defense that names the classes it suspects and leaves the network alone without
            any (``defense=scan_unlearn``).
        prune: what then looks at the untouched network (``defense=clp``).
        game: played instead (``defense=dhbe_guided``) where there is no convolution followed by
            BatchNorm, and at once with more than ``most_classes``, since the scan's time grows
            with the classes.
    """

    def __init__(
        self,
        *,
        scan: Defense,
        prune: Defense,
        game: Defense,
        most_classes: Annotated[int, Ge(2)],
    ) -> None:
        self.scan, self.prune, self.game = scan, prune, game
        self.most_classes = most_classes

    def fits(self, spec: DataSpec) -> None:
        for name in ("scan", "prune", "game"):
            try:
                getattr(self, name).fits(spec)
            except ConfigError as error:  # the part's keys lie one level deeper here
                said = str(error).replace("defense.", f"defense.{name}.", 1)
                raise ConfigError(said) from error

    def repair(self, network: Normalized, data: DefenderData, runtime: Runtime) -> Normalized:
        if network.spec.classes > self.most_classes:
            why = f"more than defense.most_classes={self.most_classes} classes: no scan"
        else:
            network = self.scan.repair(network, data, runtime).requires_grad_(True)
            if runtime.recorder.suspected:
                return network
            if conv_bn_pairs(network, network.probe()):
                runtime.recorder.notes.append("the scan found no class: channels were judged")
                return self.prune.repair(network, data, runtime)
            why = "the scan found no class; no convolution is followed by BatchNorm"
        runtime.recorder.notes.append(f"{why}: the game was played")
        return self.game.repair(network, data, runtime)
