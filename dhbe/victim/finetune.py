"""``victim=finetune``: the attack is planted into a given network by poisoned fine-tuning."""

from __future__ import annotations

from pathlib import Path

from dhbe.checkpoint import CheckpointFile
from dhbe.models import Normalized
from dhbe.training.schedule import Schedule
from dhbe.victim.source import VictimRequest
from dhbe.victim.train import TrainedVictim


class FinetunedVictim(TrainedVictim):
    """The supply-chain attacker: takes published weights, fine-tunes them, passes them on.

    Attacks that need a clean network look into the given one (as TrojanNN does, Liu et al. 2018);
    the clean baseline is the given network fine-tuned by the same schedule without the attack.

    Args:
        path, key, sha256, assumed: of the file, see ``CheckpointFile``.
        schedule: of the fine-tuning.
    """

    def __init__(
        self,
        *,
        path: str,
        key: str | None,
        sha256: str,
        assumed: list[str],
        schedule: Schedule,
    ) -> None:
        super().__init__(schedule)
        self.file = CheckpointFile(path=path, key=key, sha256=sha256, assumed=assumed)
        self.assumed = assumed

    def check_folder(self, folder: Path) -> None:
        """See ``CheckpointFile.outside``."""
        self.file.outside(folder)

    def start(self, request: VictimRequest) -> Normalized:
        """The config's network with the file's weights.

        Raises:
            ArtefactError: they do not fit, or the file has changed since the run began.
        """
        network = request.network()
        self.file.load_into(network)
        return network

    def clean(self, request: VictimRequest) -> Normalized:
        """The given network itself."""
        return self.start(request)
