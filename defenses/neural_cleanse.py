"""Neural Cleanse: find the class with an unusually small trigger, unlearn it (Wang et al. 2019)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from torch.nn import functional as F

from dhbe.contracts.defense import Defense
from dhbe.data import Budget, DefenderData, ImageSet, Resident
from dhbe.methods.cost_schedule import CostScheduler
from dhbe.methods.statistics import outliers
from dhbe.models import Normalized
from dhbe.training.runtime import Runtime
from dhbe.training.schedule import Schedule


class NeuralCleanse(Defense):
    """Reverse-engineer a trigger per class, flag outliers, fine-tune with their triggers stamped.

    For each class t: min over mask m and pattern p of CE(f((1 - m) x + m p), t) + c ||m||_1, Adam,
    with c raised while the attack succeeds and lowered while it fails. Classes whose ||m||_1 lies
    more than ``outlier`` scaled deviations below the median are flagged; the suspect is returned as
    it is if there are none. Else it is fine-tuned on the clean images but a ``share``, and on that
    share under the trigger of each flagged class, all with their true labels; the triggers are
    stamped once, so augmentation moves them.

    Args:
        start: of the latent mask and pattern: both begin at (1 + tanh start) / 2 everywhere.
        epochs: over the clean images, per class, at most.
        success: share of images that must reach the class.
        cost: first c; ``patience`` epochs in a row change it by ``factor``.
        share: of the clean images that are stamped for unlearning.
    """

    needs: ClassVar[Budget] = Budget(fraction=1e-9)

    def __init__(
        self,
        *,
        start: float,
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
        self.start, self.epochs, self.batch_size = start, epochs, batch_size
        self.learning_rate = learning_rate
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
        given = self.stamped(clean.resident(), [triggers[k] for k in flagged], runtime)
        runtime.train(network, given, self.schedule, purpose="neural_cleanse")
        return network

    def stamped(
        self, clean: Resident, triggers: Sequence[tuple[Tensor, Tensor]], runtime: Runtime
    ) -> Resident:
        """All images but a ``share``, then that share under each trigger, rounded down to uint8.

        Args:
            triggers: masks (1, 1, H, W) and patterns (1, C, H, W) in [0, 1].
        """
        order = torch.randperm(len(clean), generator=runtime.rng("neural_cleanse share"))
        plain, chosen = order.tensor_split([int(len(clean) * (1 - self.share))])
        x, part = runtime.tensor(clean.subset(chosen)), clean.subset(plain)
        marked = [(worn(x, *t) * 255).byte().to(part.images.device) for t in triggers]
        again = [clean.subset(chosen).labels] * len(triggers)
        return Resident(torch.cat([part.images, *marked]), torch.cat([part.labels, *again]))

    def reverse(
        self, network: Normalized, clean: ImageSet, target: int, runtime: Runtime
    ) -> tuple[Tensor, Tensor]:
        """The smallest mask (1, 1, H, W) found that works, and its pattern (1, C, H, W)."""
        trigger = Trigger(network, self.start)
        optimizer = torch.optim.Adam(trigger.parameters(), self.learning_rate, betas=(0.5, 0.9))
        cost = CostScheduler(self.cost, patience=self.patience, factor=self.factor)
        batches = runtime.batches(
            clean, spec=network.spec, batch_size=self.batch_size, purpose=f"reverse/{target}"
        )
        best, smallest = trigger(), float("inf")
        for epoch in range(self.epochs):
            batches.set_epoch(epoch)
            hits = []
            for batch in batches:
                goal = torch.full_like(batch.labels, target)
                mask, pattern = trigger()
                logits = network(worn(batch.images, mask, pattern))
                optimizer.zero_grad()
                (F.cross_entropy(logits, goal) + cost.value * mask.sum()).backward()
                optimizer.step()
                hits.append((logits.argmax(dim=1) == goal).float().mean())
            works = float(sum(hits)) / len(batches) >= self.success
            mask, pattern = (v.detach() for v in trigger())
            size = float(mask.sum())
            done = cost.step(works=works, shrunk=size <= 0.99 * smallest, found=smallest < math.inf)
            if works and size < smallest:
                smallest, best = size, (mask, pattern)
            if done:
                break
        return best[0].detach(), best[1].detach()


class Trigger(nn.Module):
    """Mask and pattern in (0, 1) by way of tanh, constant at first."""

    def __init__(self, network: Normalized, start: float) -> None:
        super().__init__()
        channels, size = network.spec.channels, network.spec.image_size
        mask, pattern = (torch.full((1, c, size, size), start) for c in (1, channels))
        self.mask = nn.Parameter(mask.to(network.mean))
        self.pattern = nn.Parameter(pattern.to(network.mean))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Mask (1, 1, H, W) and pattern (1, C, H, W), both in [0, 1]."""
        return (self.mask.tanh() + 1) / 2, (self.pattern.tanh() + 1) / 2


def worn(x: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
    """(1 - m) x + m p for images x (B, C, H, W), mask m and pattern p, all in [0, 1]."""
    return (1 - mask) * x + mask * pattern
