"""Gradient ascent on clean images until the network has forgotten them (RNP, ULRL)."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LambdaCallback
from torch import Tensor, nn
from torch.nn import functional as F

from dhbe.core.types import Batch
from dhbe.data import ImageSet, even
from dhbe.models import Normalized
from dhbe.training.runtime import Runtime
from dhbe.training.schedule import Schedule


def unlearn(
    network: Normalized,
    images: ImageSet,
    schedule: Schedule,
    runtime: Runtime,
    *,
    stop_accuracy: float,
    clip: float,
) -> float:
    """Maximise the cross-entropy in place; returns the accuracy on the last batch.

    Stops after the batch whose accuracy, in training mode, is at most ``stop_accuracy``. The
    official codes look at the end of each epoch; on few images that overshoots, and what is then
    recovered says little (RNP is known to be sensitive to it).

    Args:
        clip: bound of the gradient's norm over all weights.
    """
    last = Last().to(runtime.device)

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        logits = net(batch.images)
        last.accuracy = (logits.argmax(1) == batch.labels).float().mean()
        return -F.cross_entropy(logits, batch.labels)

    def stop(trainer: pl.Trainer, *_: Any) -> None:
        runtime.processes.average([last.accuracy])
        trainer.should_stop = bool(last.accuracy <= stop_accuracy)

    runtime.stage("unlearn").train(
        network,
        images,
        schedule,
        purpose="unlearn",
        role="unlearn",
        batch_size=even(len(images), schedule.batch_size),
        loss=loss,
        clip=clip,
        beside=last,
        callbacks=[LambdaCallback(on_train_start=stop, on_train_batch_end=stop)],
    )
    network.eval()
    reached = float(last.accuracy)
    runtime.recorder.notes.append(
        f"unlearned to an accuracy of {reached:.2f} on its images"
        + (f", not the {stop_accuracy:.2f} wanted" if reached > stop_accuracy else "")
    )
    return reached


class Last(nn.Module):
    """Accuracy on the last batch; a resumed run knows by it that it had stopped."""

    accuracy: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("accuracy", torch.ones(()))
