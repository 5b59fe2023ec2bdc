"""Grant the defender images within the budget, and nothing of the test set."""

from __future__ import annotations

import torch

from dhbe.core.errors import got
from dhbe.data import DefenderData, Splits
from dhbe.evaluation.evaluator import Evaluator
from dhbe.experiment.assembly import Parts
from dhbe.victim.store import Victim


def grant(
    parts: Parts, splits: Splits | None, victim: Victim, seed: int, evaluator: Evaluator | None
) -> DefenderData:
    """The defender's data: the pool within the budget, and the poisoned set only if granted."""
    if splits is None:
        return DefenderData(parts.budget, pool=None, train_size=0, seed=seed)
    poisoned = oracle = None
    if parts.budget.poisoned:
        if len(victim.indicator) != len(splits.train):
            raise got(
                "budget",
                parts.budget.name,
                "one without the poisoned training set: which of these images were poisoned is "
                "known of victims that are trained here, and of the zoo's beside their data set",
            )
        poisoned = victim.attack.poison(splits.train, victim.indicator, seed=seed).resident()
    if parts.defense.selection == "oracle" and evaluator is not None:
        oracle = evaluator.observer()

    @torch.no_grad()
    def triggered(x: torch.Tensor, y: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        device = parts.trainer.device
        attack = victim.attack.to(device).eval()
        return attack.apply(x.to(device), y=y.to(device), index=index.to(device))

    return DefenderData(
        parts.budget,
        pool=splits.pool,
        train_size=len(splits.train) + len(splits.pool),
        seed=seed,
        poisoned=poisoned,
        trigger=triggered if victim.attack.active else None,
        oracle=oracle,
    )
