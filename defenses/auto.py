"""Scan first, unlearn what it finds; otherwise play the guided game. Ours, data-free."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge

from dhbe.contracts.defense import Defense
from dhbe.core.types import DataSpec
from dhbe.data import DefenderData
from dhbe.models import Normalized
from dhbe.training.runtime import Runtime


class Auto(Defense):
    """``scan`` if it suspects a class, else ``otherwise``.

    Triggers that the scan does not find still meet the patches of the game. What either costs:
    docs/results/real_networks.md.

    The scan's time grows with the number of classes; with more than ``most_classes`` the game is
    played at once.

    Args:
        scan: a defense that names the classes it suspects and leaves the network alone without
            any (``defense=scan_unlearn``).
        otherwise: what then plays on the untouched network (``defense=dhbe_guided``).
    """

    def __init__(
        self, *, scan: Defense, otherwise: Defense, most_classes: Annotated[int, Ge(2)]
    ) -> None:
        self.scan, self.otherwise, self.most_classes = scan, otherwise, most_classes

    def fits(self, spec: DataSpec) -> None:
        self.scan.fits(spec)
        self.otherwise.fits(spec)

    def repair(self, network: Normalized, data: DefenderData, runtime: Runtime) -> Normalized:
        why = f"more than defense.most_classes={self.most_classes} classes, so no scan"
        if network.spec.classes <= self.most_classes:
            network = self.scan.repair(network, data, runtime)
            if runtime.recorder.suspected:
                return network
            why = "the scan found no class to unlearn"
        runtime.recorder.notes.append(f"{why}: the game was played")
        return self.otherwise.repair(network.requires_grad_(True), data, runtime)
