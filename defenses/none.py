"""No defense: the victim as it is."""

from __future__ import annotations

from dhbe.contracts.defense import Defense
from dhbe.data import DefenderData
from dhbe.models import Normalized
from dhbe.training.runtime import Runtime


class NoDefense(Defense):
    """Returns the suspect's network unchanged."""

    idle = True

    def repair(self, network: Normalized, data: DefenderData, runtime: Runtime) -> Normalized:
        del data, runtime
        return network
