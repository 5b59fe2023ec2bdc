"""Victims from memory, for ``dhbe.purify(model)``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from dhbe.models import Normalized
from dhbe.models.interface import channels_last
from dhbe.victim.source import VictimRequest, VictimSource, untrained
from dhbe.victim.store import Victim


class InMemoryVictim(VictimSource):
    """A module in memory.

    Args:
        network: from normalised images to logits.
        assumed: notes on settings that were assumed.
    """

    def __init__(self, network: nn.Module, assumed: Sequence[str] = ()) -> None:
        self.network, self.assumed = network, list(assumed)

    def obtain(self, request: VictimRequest) -> Victim:
        """The network, with the config's normalisation before it."""
        return untrained(channels_last(Normalized(self.network, request.spec)), request.attack)
