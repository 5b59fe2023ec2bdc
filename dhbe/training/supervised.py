"""Supervised training shared by victims and fine-tuning defenses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import pytorch_lightning as pl
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from dhbe.core.errors import DivergenceError
from dhbe.core.types import Batch
from dhbe.data import TrainingBatches
from dhbe.training.compile import begin_step
from dhbe.training.parallel import Processes
from dhbe.training.schedule import Player, Schedule

Loss = Callable[[nn.Module, Batch], Tensor]


def cross_entropy(network: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy () in nats of the images (B, C, H, W) and labels (B,) of a batch."""
    return F.cross_entropy(network(batch.images), batch.labels)


class Options(TypedDict, total=False):
    """What a training may be told besides network, images and schedule.

    loss: of a batch; default: the mean cross-entropy.
    players: networks that learn in the same steps from the same loss.
    beside: module whose state belongs to the training and goes into its checkpoints.
    train_mode: False keeps the network in eval mode (BatchNorm statistics, dropout).
    before_epoch: called with the fraction of the budget that is spent.
    after_step: called after every step, for projections.
    clip: bound of the norm of the network's gradient.
    """

    loss: Loss
    players: Sequence[Player]
    beside: nn.Module | None
    train_mode: bool
    before_epoch: Callable[[float], None] | None
    after_step: Callable[[], None] | None
    clip: float | None


class Supervised(pl.LightningModule):
    """Train ``network`` on ``batches`` by a loss; the last epoch is kept, whatever its accuracy.

    Args:
        schedule: the network's; its epochs are the budget of all players.
        role: who is trained (``victim``, ``student``); the logged loss is ``<role>/loss``.
        processes: that share every batch.
        loss, players, beside, train_mode, before_epoch, after_step, clip: see ``Options``.
    """

    def __init__(
        self,
        network: nn.Module,
        batches: TrainingBatches,
        schedule: Schedule,
        *,
        role: str,
        processes: Processes | None = None,
        loss: Loss = cross_entropy,
        players: Sequence[Player] = (),
        beside: nn.Module | None = None,
        train_mode: bool = True,
        before_epoch: Callable[[float], None] | None = None,
        after_step: Callable[[], None] | None = None,
        clip: float | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.role, self.processes = role, processes or Processes()
        self.network, self.batches, self.schedule, self.loss = network, batches, schedule, loss
        self.players = [Player(network=network, schedule=schedule), *players]
        self.beside, self.train_mode = beside, train_mode
        self.before_epoch, self.after_step, self.clip = before_epoch, after_step, clip
        self._sum: Tensor | None = None

    def configure_optimizers(self) -> Any:
        """One optimiser per player; rates change with every step."""
        steps = self.schedule.epochs * len(self.batches)
        optimizers = [p.schedule.optimizer(p.network) for p in self.players]
        rates = [
            LambdaLR(o, lambda step, s=p.schedule: s.factor((step + 0.5) / steps))  # type: ignore[misc]
            for o, p in zip(optimizers, self.players, strict=True)
        ]
        return optimizers, rates

    def on_train_epoch_start(self) -> None:
        """Choose the epoch's order and augmentation, and the network's mode."""
        self.batches.set_epoch(self.current_epoch)
        self.network.train(self.train_mode)
        if self.before_epoch is not None:
            self.before_epoch(self.current_epoch / self.schedule.epochs)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step of every optimiser on the same loss; returns that loss (), without gradient."""
        del batch_idx
        optimizers = self.optimizers(use_pl_optimizer=True)
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        rates = self.lr_schedulers()
        begin_step()
        loss = self.loss(self.network, batch.part(self.processes.rows(len(batch.labels))))
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        self.processes.average_gradients(optimizers)
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.clip)
        for optimizer in optimizers:
            optimizer.step()
        for rate in rates if isinstance(rates, list) else [rates]:
            assert rate is not None
            rate.step()
        if self.after_step is not None:
            self.after_step()
        self._sum = loss.detach() if self._sum is None else self._sum + loss.detach()
        return loss.detach()

    def on_train_epoch_end(self) -> None:
        """Log the mean loss.

        Raises:
            DivergenceError: it is not finite.
        """
        assert self._sum is not None
        mean = self._sum / len(self.batches)
        self._sum = None
        self.processes.average([mean])
        self.log(f"{self.role}/loss", mean)
        if not mean.isfinite():
            raise DivergenceError(
                f"training diverged in epoch {self.current_epoch}: loss {float(mean)}; "
                f"lower the learning rate (now {self.schedule.learning_rate})"
            )
