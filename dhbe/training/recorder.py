"""Records of a training: curves, pictures, seconds, last checkpoint."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from torch import Tensor, nn

from dhbe.core.durable import replace
from dhbe.training.compile import eager

log = logging.getLogger(__name__)


class Recorder(Checkpoint):
    """Curves and pictures of one stage; travels with the checkpoint, so a resumed run keeps them.

    A Lightning ``Checkpoint``, because these run after the module has logged its epoch.

    Args:
        observe: measures the network being trained (evaluation callback; nothing flows back).
        every: epochs between two observations; 0 switches them off.
    """

    def __init__(
        self, observe: Callable[[nn.Module], dict[str, float]] | None = None, every: int = 0
    ) -> None:
        self.rows: list[dict[str, float]] = []
        self.pictures: dict[str, np.ndarray] = {}
        self.notes: list[str] = []
        self.suspected: list[int] | None = None
        self.scores: list[float] | None = None
        self.isolated: list[int] | None = None
        self._observe, self._every = observe, every

    def due(self, epoch: int, epochs: int) -> bool:
        """Whether this epoch is one to observe (every n-th, and the last)."""
        return bool(self._every) and ((epoch + 1) % self._every == 0 or epoch + 1 == epochs)

    def observe(self, network: nn.Module, epoch: int) -> None:
        """Add ACC and ASR of ``network``, measured by the evaluation, to this epoch's row."""
        if self._observe is None:
            return
        training = {m: m.training for m in network.modules()}
        with eager():
            figures = self._observe(network.eval())
        for module, mode in training.items():
            module.training = mode
        self.add(epoch, {f"val/{k}": v for k, v in figures.items()})

    def add(self, epoch: int, figures: dict[str, float]) -> None:
        """Add figures to the row of an epoch (counted from 0)."""
        if not self.rows or self.rows[-1]["epoch"] != epoch:
            self.rows.append({"epoch": epoch})
        self.rows[-1].update(figures)

    def suspect(
        self, classes: Sequence[int], how: str, scores: Sequence[float] | None = None
    ) -> None:
        """Keep the classes that a detector takes for targets (none, if it finds no backdoor).

        Args:
            how: method and details, for the note.
            scores: how much every class stands out, in the detector's units.
        """
        self.suspected = sorted(classes)
        self.scores = None if scores is None else list(scores)
        listed = ", ".join(map(str, self.suspected)) or "none"
        self.notes.append(f"{how}; suspicious classes: {listed}")

    def isolate(self, positions: Tensor, how: str) -> None:
        """Keep the positions (n,) in the poisoned set that a defense takes for poison.

        Args:
            how: method and details, for the note.
        """
        self.isolated = positions.tolist()
        self.notes.append(how)

    def picture(self, name: str, images: Tensor) -> None:
        """Keep images (N, C, H, W) in [0, 1] under a name; values outside are clipped."""
        pixels = images.detach().float().clamp(0, 1).mul(255).round()
        self.pictures[name] = pixels.to(torch.uint8).cpu().numpy()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copy what the module logged in this epoch; tell its logger what was observed."""
        logged = {k: float(v) for k, v in trainer.callback_metrics.items()}
        self.add(trainer.current_epoch, logged)
        observed = {k: v for k, v in self.rows[-1].items() if k.startswith("val/")}
        if trainer.logger and observed:
            trainer.logger.log_metrics(observed, step=trainer.fit_loop.total_batch_idx)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        pictures = {k: torch.from_numpy(v) for k, v in self.pictures.items()}
        kept = {"rows": self.rows, "notes": self.notes, "suspected": self.suspected}
        kept |= {"scores": self.scores, "isolated": self.isolated}
        return {**kept, "pictures": pictures}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint."""
        self.rows, self.notes = state_dict["rows"], state_dict["notes"]
        self.suspected, self.isolated = state_dict["suspected"], state_dict.get("isolated")
        self.scores = state_dict.get("scores")
        self.pictures = {k: v.numpy() for k, v in state_dict["pictures"].items()}


class Stopwatch:
    """Seconds of a stage since it began, those of its killed attempts included.

    What an attempt did after its last finished epoch is not counted.

    Args:
        folder: where the stage keeps its checkpoints.
    """

    def __init__(self, folder: Path) -> None:
        self.file, self.start = folder / "seconds", time.perf_counter()
        self.earlier = self._read()

    def _read(self) -> float:
        try:
            found = float(self.file.read_text())
        except FileNotFoundError:
            return 0.0
        except (OSError, ValueError):
            found = float("nan")
        if 0 <= found < float("inf"):
            return found
        log.warning("%s: damaged; the seconds of earlier attempts are not counted", self.file)
        return 0.0

    @property
    def seconds(self) -> float:
        """So far."""
        return self.earlier + time.perf_counter() - self.start

    def save(self) -> None:
        """For the attempt that comes after a kill."""
        fresh = self.file.with_suffix(".new")
        fresh.write_text(str(self.seconds))
        replace(fresh, self.file)
