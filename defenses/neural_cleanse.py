"""Neural Cleanse: find the class with an unusually small trigger, unlearn it (Wang et al. 2019)."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from torch.nn import functional as F

from dhbe.contracts.defense import Defense
from dhbe.core.types import Batch
from dhbe.data import Budget, DefenderData, ImageSet, TrainingBatches
from dhbe.methods.statistics import outliers
from dhbe.models import Normalized
from dhbe.training.runtime import Runtime
from dhbe.training.schedule import Schedule
from dhbe.training.supervised import Supervised

IDLE = 25
"""Epochs without a mask 1 % smaller after which a class is done, once the cost went up and down."""


class NeuralCleanse(Defense):
    """Reverse-engineer a trigger per class, flag outliers, fine-tune with their triggers stamped.

    For each class t: min over mask m and pattern p of CE(f((1 - m) x + m p), t) + c ||m||_1, Adam,
    with c raised while the attack succeeds and lowered while it fails. Classes whose ||m||_1 lies
    more than ``outlier`` scaled deviations below the median are flagged; the suspect is returned as
    it is if there are none.

    Args:
        epochs: over the clean images, per class, at most.
        success: share of images that must reach the class.
        cost: first c; ``patience`` epochs in a row change it by ``factor``.
        share: of the images of a batch that are stamped when unlearning.
    """

    needs: ClassVar[Budget] = Budget(fraction=1e-9)

    def __init__(
        self,
        *,
        epochs: Annotated[int, Ge(1)],
        batch_size: Annotated[int, Ge(2)],
        learning_rate: Annotated[float, Gt(0)],
        success: Annotated[float, Gt(0), Le(1)],
        cost: Annotated[float, Gt(0)],
        patience: Annotated[int, Ge(1)],
        factor: Annotated[float, Gt(1)],
        outlier: Annotated[float, Gt(0)],
        share: Annotated[float, Gt(0), Le(1)],
        schedule: Schedule,
    ) -> None:
        self.epochs, self.batch_size, self.learning_rate = epochs, batch_size, learning_rate
        self.success, self.cost, self.patience, self.factor = success, cost, patience, factor
        self.outlier, self.share, self.schedule = outlier, share, schedule

    def repair(self, network: Normalized, data: DefenderData, runtime: Runtime) -> Normalized:
        clean = data.clean()
        network.requires_grad_(False)
        with runtime.autocast():
            triggers = [
                self.reverse(network, clean, k, runtime) for k in range(network.spec.classes)
            ]
        network.requires_grad_(True)
        sizes = torch.stack([mask.sum() for mask, _ in triggers]).cpu()
        flagged = outliers(sizes.numpy(), self.outlier, side="below")
        rounded = [round(float(s), 1) for s in sizes]
        runtime.recorder.suspect(flagged, f"neural_cleanse, mask sizes {rounded}")
        shown = torch.cat([mask * pattern for mask, pattern in triggers])
        runtime.recorder.picture("triggers_found", shown)
        if not flagged:
            return network
        found = [triggers[k] for k in flagged]
        batches = TrainingBatches(
            clean,
            spec=network.spec,
            batch_size=self.schedule.batch_size,
            seed=runtime.derive("neural_cleanse"),
            device=runtime.device,
        )

        def loss(net: nn.Module, batch: Batch) -> Tensor:
            x = batch.images.to(runtime.dtype)
            drawn = torch.rand((len(x), 1, 1, 1), generator=batches.noise, device=x.device)
            for i, (mask, pattern) in enumerate(found):
                low, high = (self.share * k / len(found) for k in (i, i + 1))
                chosen = (drawn >= low) & (drawn < high)
                x = torch.where(chosen, (1 - mask) * x + mask * pattern, x)
            return F.cross_entropy(net(x), batch.labels)

        module = Supervised(network, batches, self.schedule, role="student", loss=loss)
        runtime.fit(module, batches, epochs=self.schedule.epochs)
        return network

    def reverse(
        self, network: Normalized, clean: ImageSet, target: int, runtime: Runtime
    ) -> tuple[Tensor, Tensor]:
        """The smallest mask (1, 1, H, W) found that works, and its pattern (1, C, H, W)."""
        rng = runtime.rng("trigger", target)
        channels, size = network.spec.channels, network.spec.image_size
        latents = [
            torch.randn((1, c, size, size), generator=rng).to(runtime.device, runtime.dtype)
            for c in (1, channels)
        ]
        latents = [v.requires_grad_(True) for v in latents]
        optimizer = torch.optim.Adam(latents, lr=self.learning_rate, betas=(0.5, 0.9))
        batches = TrainingBatches(
            clean,
            spec=network.spec,
            batch_size=self.batch_size,
            seed=runtime.derive("reverse", target),
            device=runtime.device,
        )

        def trigger() -> tuple[Tensor, Tensor]:
            mask, pattern = ((v.tanh() + 1) / 2 for v in latents)
            return mask, pattern

        best = tuple(v.detach() for v in trigger())
        smallest, cost, streak = float("inf"), self.cost, 0
        idle, turned = 0, set[str]()
        for epoch in range(self.epochs):
            batches.set_epoch(epoch)
            hits = torch.zeros((), device=runtime.device)
            for batch in batches:
                x = batch.images.to(runtime.dtype)
                goal = torch.full_like(batch.labels, target)
                mask, pattern = trigger()
                logits = network((1 - mask) * x + mask * pattern)
                optimizer.zero_grad()
                (F.cross_entropy(logits, goal) + cost * mask.sum()).backward()
                optimizer.step()
                hits += (logits.argmax(dim=1) == goal).float().mean()
            works = float(hits) / len(batches) >= self.success
            mask, pattern = (v.detach() for v in trigger())
            if smallest < float("inf"):
                idle = idle + 1 if not works or float(mask.sum()) > 0.99 * smallest else 0
            if works and float(mask.sum()) < smallest:
                smallest, best = float(mask.sum()), (mask, pattern)
            streak = max(streak, 0) + 1 if works else min(streak, 0) - 1
            if streak == self.patience:
                cost, streak = cost * self.factor, 0
                turned.add("up")
            elif streak == -self.patience:
                cost, streak = cost / self.factor**1.5, 0
                turned.add("down")
            if idle >= IDLE and len(turned) == 2:
                break
        return best[0], best[1]
