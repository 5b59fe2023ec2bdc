"""Supervised training shared by victims and fine-tuning defenses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import pytorch_lightning as pl
import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from dhbe.data import TrainingBatches
from dhbe.errors import DivergenceError
from dhbe.types import Batch

Loss = Callable[[nn.Module, Batch], Tensor]


def cross_entropy(network: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of a batch."""
    return F.cross_entropy(network(batch.images), batch.labels)


class Schedule:
    """SGD and its learning rate over a budget of epochs, in fractions of that budget.

    Args:
        schedule: ``multistep`` multiplies by ``decay`` at each of ``milestones`` (fractions);
            ``cosine`` falls to zero; ``onecycle`` rises over the first fifth, then falls linearly.
    """

    def __init__(
        self,
        *,
        epochs: Annotated[int, Ge(1)],
        batch_size: Annotated[int, Ge(2)],
        learning_rate: Annotated[float, Gt(0)],
        momentum: Annotated[float, Ge(0), Le(1)],
        nesterov: bool,
        weight_decay: Annotated[float, Ge(0)],
        schedule: Literal["multistep", "cosine", "onecycle"],
        milestones: list[Annotated[float, Gt(0), Le(1)]],
        decay: Annotated[float, Gt(0), Le(1)],
    ) -> None:
        self.epochs, self.batch_size = epochs, batch_size
        self.learning_rate, self.momentum, self.nesterov = learning_rate, momentum, nesterov
        self.weight_decay = weight_decay
        self.schedule, self.milestones, self.decay = schedule, milestones, decay

    def factor(self, progress: float) -> float:
        """Factor on the learning rate after a fraction ``progress`` of the budget."""
        if self.schedule == "multistep":
            return float(self.decay ** sum(progress >= m for m in self.milestones))
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        peak = 0.2
        return progress / peak if progress < peak else (1 - progress) / (1 - peak)

    def optimizer(self, network: nn.Module) -> torch.optim.SGD:
        """SGD over all parameters that require a gradient."""
        return torch.optim.SGD(
            [p for p in network.parameters() if p.requires_grad],
            lr=self.learning_rate,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
            fused=True,
        )


class Supervised(pl.LightningModule):
    """Train ``network`` on ``batches`` by a loss; the last epoch is kept, whatever its accuracy.

    Args:
        role: who is trained (``victim``, ``student``); the logged loss is ``<role>/loss``.
    """

    def __init__(
        self,
        network: nn.Module,
        batches: TrainingBatches,
        schedule: Schedule,
        *,
        role: str,
        loss: Loss = cross_entropy,
    ) -> None:
        super().__init__()
        self.role = role
        self.network, self.batches, self.schedule, self.loss = network, batches, schedule, loss
        self._sum: Tensor | None = None

    def configure_optimizers(self) -> Any:
        """SGD whose rate changes with every step."""
        optimizer = self.schedule.optimizer(self.network)
        steps = self.schedule.epochs * len(self.batches)
        rate = LambdaLR(optimizer, lambda step: self.schedule.factor((step + 0.5) / steps))
        return [optimizer], [{"scheduler": rate, "interval": "step"}]

    def on_train_epoch_start(self) -> None:
        """Choose the epoch's order and augmentation."""
        self.batches.set_epoch(self.current_epoch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One optimiser step."""
        del batch_idx
        loss = self.loss(self.network, batch)
        self._sum = loss.detach() if self._sum is None else self._sum + loss.detach()
        return loss

    def on_train_epoch_end(self) -> None:
        """Log the mean loss.

        Raises:
            DivergenceError: it is not finite.
        """
        assert self._sum is not None
        mean = self._sum / len(self.batches)
        self._sum = None
        self.log(f"{self.role}/loss", mean)
        if not mean.isfinite():
            raise DivergenceError(
                f"training diverged in epoch {self.current_epoch}: loss {float(mean)}; "
                f"lower the learning rate (now {self.schedule.learning_rate})"
            )
