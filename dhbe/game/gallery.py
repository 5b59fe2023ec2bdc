"""Pictures of the players, and the student shown to the recorder, during a game."""

from __future__ import annotations

import pytorch_lightning as pl

from dhbe.game.distillation import Distillation
from dhbe.game.noise import SeededNoise
from dhbe.models import Normalized
from dhbe.training.runtime import Runtime

PICTURES = 16
"""Generated images and patches kept per picture."""


class Gallery(pl.Callback):
    """Shows the student to the recorder, and keeps pictures of what the generators make."""

    def __init__(self, network: Normalized, runtime: Runtime) -> None:
        self.network, self.runtime = network, runtime
        self.noise = SeededNoise(
            runtime.derive("gallery"), device=runtime.device, dtype=runtime.dtype
        )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the student and keep pictures, every few epochs and after the last."""
        assert isinstance(pl_module, Distillation)
        recorder, epoch = self.runtime.recorder, trainer.current_epoch
        if not recorder.due(epoch, pl_module.epochs):
            return
        recorder.observe(self.network.around(pl_module.purified), epoch)
        self.noise.set_epoch(0)  # the same latents every time: the pictures show the players change
        images, patches = pl_module.sample(PICTURES, self.noise)
        recorder.picture(f"generated_{epoch + 1:04d}", self.network.denormalize(images))
        if patches is not None:
            levels = (self.network.turned(patches) + 1) / 2  # grey: no change
            recorder.picture(f"patches_{epoch + 1:04d}", levels)
