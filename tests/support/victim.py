"""Short trainings, and one that is interrupted."""

from __future__ import annotations

import pytorch_lightning as pl

from dhbe.training.schedule import OneCycle, SGDSchedule


def schedule(epochs: int = 2, **changes) -> SGDSchedule:
    known = {
        "batch_size": 16,
        "learning_rate": 0.05,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 5e-4,
        "shape": OneCycle(),
    }
    return SGDSchedule(epochs=epochs, **(known | changes))


class StopAfter(pl.Callback):
    """Ends training the hard way after some epochs."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        if trainer.current_epoch == self.epochs:
            raise InterruptedError
