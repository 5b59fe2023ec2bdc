"""``victim=checkpoint``: the victim is read from a checkpoint file."""

from __future__ import annotations

from pathlib import Path

from dhbe.checkpoint import CheckpointFile
from dhbe.victim.source import VictimRequest, VictimSource, untrained
from dhbe.victim.store import Victim


class CheckpointVictim(CheckpointFile, VictimSource):
    """A file of weights, as ``CheckpointFile`` describes it."""

    def check_folder(self, folder: Path) -> None:
        """See ``CheckpointFile.outside``."""
        self.outside(folder)

    def obtain(self, request: VictimRequest) -> Victim:
        """The config's network with the file's weights."""
        network = request.network()
        self.load_into(network)
        return untrained(network, request.attack)
