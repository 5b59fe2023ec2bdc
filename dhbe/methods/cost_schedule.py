"""The price of a trigger's size in a search for the smallest one that works (Neural Cleanse)."""

from __future__ import annotations

IDLE = 25
"""Epochs without a mask 1 % smaller that end a search, once the price went up and down."""


class CostScheduler:
    """The price of a mask: raised while the attack succeeds, lowered while it fails.

    Args:
        cost: first price.
        patience: epochs in a row that change it by ``factor``.
    """

    def __init__(self, cost: float, *, patience: int, factor: float) -> None:
        self.value, self.patience, self.factor = cost, patience, factor
        self.streak = self.idle = 0
        self.turned = set[str]()

    def step(self, *, works: bool, shrunk: bool, found: bool) -> bool:
        """Adjust the price after an epoch; whether the search is over.

        Args:
            works: the attack succeeds.
            shrunk: the mask is at least 1 % smaller than the best before.
            found: there is a best before.
        """
        if found:
            self.idle = 0 if works and shrunk else self.idle + 1
        self.streak = max(self.streak, 0) + 1 if works else min(self.streak, 0) - 1
        if self.streak == self.patience:
            self.value, self.streak = self.value * self.factor, 0
            self.turned.add("up")
        elif self.streak == -self.patience:
            self.value, self.streak = self.value / self.factor**1.5, 0
            self.turned.add("down")
        return self.idle >= IDLE and len(self.turned) == 2
