"""Progress bar of a training: stage, time left, and the last measured ACC and ASR."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import RichProgressBar

from dhbe.training.recorder import Recorder


class StageBar(RichProgressBar):
    """Rich's bar for one epoch, with the stage and the time left for the whole training.

    Args:
        recorder: holds the rates that the evaluation measured; none appear where it measures none.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__(leave=False)
        self.recorder, self.begun, self.first = recorder, 0.0, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the time and the epoch, which is not the first in a resumed training."""
        super().on_train_start(trainer, pl_module)
        self.begun, self.first = time.monotonic(), trainer.current_epoch

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """The last observed rates in percent, instead of Lightning's version number."""
        rows = [row for row in self.recorder.rows if "val/acc" in row]
        rates = {k: rows[-1].get(f"val/{k}") for k in ("acc", "asr")} if rows else {}
        return {k.upper(): f"{100 * v:.1f} %" for k, v in rates.items() if v is not None}

    def _get_train_description(self, current_epoch: int) -> str:
        stage = getattr(self.trainer.lightning_module, "role", "game")
        epochs = self.trainer.max_epochs or 0
        text = f"{stage}: epoch {current_epoch + 1}/{epochs}"
        done = current_epoch - self.first
        if done:
            pace = (time.monotonic() - self.begun) / done
            left = timedelta(seconds=round(pace * (epochs - current_epoch)))
            text += f", {left} left"
        return text
