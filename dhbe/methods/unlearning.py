"""Training until an accuracy is reached: forgetting the clean task, learning it again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LambdaCallback
from torch import Tensor, nn
from torch.nn import functional as F

from dhbe.core.types import Batch
from dhbe.data import ImageSet, even
from dhbe.models import Normalized
from dhbe.models.shortcuts import filters
from dhbe.training.runtime import Runtime
from dhbe.training.schedule import Schedule


def unlearn(
    network: Normalized,
    images: ImageSet,
    schedule: Schedule,
    runtime: Runtime,
    *,
    stop_accuracy: float,
    clip: float | None,
) -> float:
    """Maximise the cross-entropy in place; returns the accuracy on the last batch.

    Stops after the batch whose accuracy, in training mode, is at most ``stop_accuracy``. The
    official codes look at the end of each epoch; on few images that overshoots, and what is then
    recovered says little (RNP is known to be sensitive to it).

    Args:
        clip: bound of the gradient's norm over all weights; None: none.
    """
    reached = train_until(
        network,
        images,
        schedule,
        runtime,
        name="unlearn",
        loss=lambda logits, batch: -F.cross_entropy(logits, batch.labels),
        stop=lambda accuracy: accuracy <= stop_accuracy,
        clip=clip,
    )
    runtime.recorder.notes.append(
        f"unlearned to an accuracy of {reached:.3f} on its images"
        + (f", not the {stop_accuracy:.3f} wanted" if reached > stop_accuracy else "")
    )
    return reached


def train_until(
    network: Normalized,
    images: ImageSet,
    schedule: Schedule,
    runtime: Runtime,
    *,
    name: str,
    loss: Callable[[Tensor, Batch], Tensor],
    stop: Callable[[Tensor], Tensor],
    every: Literal["batch", "epoch"] = "batch",
    clip: float | None = None,
) -> float:
    """Train in place until the accuracy says stop, at most for the schedule; returns the accuracy.

    Args:
        name: of the stage, its random stream and the role in the log.
        loss: of logits (B, K) and their batch.
        stop: takes the accuracy () on the last batch or epoch, in training mode.
        every: when to ask.
        clip: bound of the gradient's norm over all weights.
    """
    last = Last().to(runtime.device)

    def step(net: nn.Module, batch: Batch) -> Tensor:
        logits = net(batch.images)
        last.add((logits.argmax(1) == batch.labels).float().mean())
        return loss(logits, batch)

    def ask(trainer: pl.Trainer, *_: Any) -> None:
        runtime.processes.average([last.accuracy])
        trainer.should_stop = bool(stop(last.accuracy))

    def begin(*_: Any) -> None:
        last.forget()

    asks: dict[str, Any] = {f"on_train_{every}_start": begin, f"on_train_{every}_end": ask}
    runtime.stage(name).train(
        network,
        images,
        schedule,
        purpose=name,
        role=name,
        batch_size=even(len(images), schedule.batch_size),
        loss=step,
        clip=clip,
        beside=last,
        callbacks=[LambdaCallback(on_train_start=ask, **asks)],
    )
    network.eval()
    return float(last.accuracy)


class Last(nn.Module):
    """Mean accuracy of the last batches; a resumed run knows by it that it had stopped."""

    accuracy: Tensor
    batches: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("accuracy", torch.full((), torch.nan))  # neither high nor low
        self.register_buffer("batches", torch.zeros(()))

    def forget(self) -> None:
        """Begin anew with the next batch."""
        self.batches.zero_()

    def add(self, accuracy: Tensor) -> None:
        """Take the accuracy () of one more batch into the mean."""
        self.batches += 1
        mean = torch.where(self.batches == 1, accuracy, self.accuracy)
        self.accuracy = mean + (accuracy - mean) / self.batches


@torch.no_grad()
def changes(before: nn.Module, after: nn.Module) -> list[Tensor]:
    """|w - w'| of the weights of each filter, (C_out, C_in K K) of each layer.

    Sums over a row are the neuron weight changes (NWC) of Lin et al. (NeurIPS 2024).
    """
    pairs = zip(filters(before), filters(after), strict=True)
    return [(a.weight - b.weight).abs().flatten(1) for a, b in pairs]
