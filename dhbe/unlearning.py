"""Gradient ascent on clean images until the network has forgotten them (RNP, ULRL)."""

from __future__ import annotations

from pytorch_lightning.callbacks import LambdaCallback
from torch import Tensor, nn
from torch.nn import functional as F

from dhbe.data import ImageSet, TrainingBatches
from dhbe.models import Normalized
from dhbe.runtime import Runtime
from dhbe.training import Schedule, Supervised
from dhbe.types import Batch


def unlearn(
    network: Normalized,
    images: ImageSet,
    schedule: Schedule,
    runtime: Runtime,
    *,
    stop_accuracy: float,
    clip: float,
) -> float:
    """Maximise the cross-entropy in place; returns the accuracy of the last epoch.

    Stops after the epoch whose running training accuracy is at most ``stop_accuracy``.

    Args:
        clip: bound of the gradient's norm over all weights.
    """
    own = runtime.stage("unlearn")
    batches = TrainingBatches(
        images,
        spec=network.spec,
        batch_size=schedule.batch_size,
        seed=runtime.derive("unlearn"),
        device=runtime.device,
    )
    hits: list[Tensor] = []
    reached = [1.0]

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        logits = net(batch.images.to(runtime.dtype))
        hits.append((logits.argmax(1) == batch.labels).float().mean().detach())
        return -F.cross_entropy(logits, batch.labels)

    def stop(trainer: object, _: object) -> None:
        reached[0] = float(sum(hits) / len(hits))
        hits.clear()
        if reached[0] <= stop_accuracy:
            trainer.should_stop = True  # type: ignore[attr-defined]

    module = Supervised(network, batches, schedule, role="unlearn", loss=loss, clip=clip)
    own.fit(
        module,
        batches,
        epochs=schedule.epochs,
        callbacks=[LambdaCallback(on_train_epoch_end=stop)],
    )
    network.eval()
    runtime.recorder.notes.append(f"unlearned to an accuracy of {reached[0]:.2f} on its images")
    return reached[0]
