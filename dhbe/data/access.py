"""Budgeted data access: what the defender's budget grants, an error for everything else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from dhbe.core.errors import BudgetError, got
from dhbe.core.rng import generator
from dhbe.data.images import ImageSet, Resident
from dhbe.data.loader import to_float
from dhbe.data.splits import proportional

VALIDATION_SHARE = 0.2
"""Part of the granted clean images that ``validation()`` sets aside for choosing."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a defender is granted, or what a defense needs.

    Attributes:
        name: as in the config group, for messages and tables.
        fraction: clean images as a fraction of the official training part.
        per_class: clean images per class (added to nothing: set one of the two).
        poisoned: the poisoned training set.
        incoming: number of inputs seen at inference time, triggered ones among them.
    """

    name: str = "needs"
    fraction: Annotated[float, Ge(0), Le(1)] = 0.0
    per_class: Annotated[int, Ge(0)] = 0
    poisoned: bool = False
    incoming: Annotated[int, Ge(0)] = 0

    @property
    def clean(self) -> bool:
        """Whether any clean image is granted."""
        return self.fraction > 0 or self.per_class > 0

    def missing(self, needs: Budget) -> str:
        """What ``needs`` asks for and this budget does not grant, in words; empty if nothing."""
        lacking = [
            word
            for word, needed, granted in (
                ("clean images", needs.clean, self.clean),
                ("the poisoned training set", needs.poisoned, self.poisoned),
                ("incoming images", needs.incoming > 0, self.incoming > 0),
            )
            if needed and not granted
        ]
        return " and ".join(lacking)


class DefenderData:
    """Images within a budget; there is no test set and no trigger inside.

    Args:
        pool: clean images set aside for the defender, disjoint from the attacker's.
        train_size: number of images that ``budget.fraction`` refers to.
        poisoned: the poisoned training set, given only if the budget grants it.
        trigger: (images, labels, positions) -> triggered images; stamps every other one of the
            incoming images, which come from the rest of the pool, and is not kept.
        oracle: measures ACC and ASR of a network on the test set; given only to a defense whose
            ``selection`` is ``oracle``, which marks its rows in every table.
    """

    def __init__(
        self,
        budget: Budget,
        *,
        pool: ImageSet | None,
        train_size: int,
        seed: int,
        poisoned: Resident | None = None,
        trigger: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
        oracle: Callable[[nn.Module], dict[str, float]] | None = None,
    ) -> None:
        self.budget, self.seed = budget, seed
        self._pool, self._poisoned, self._oracle = pool, poisoned, oracle
        self._incoming: Resident | None = None
        self._chosen = torch.empty(0, dtype=torch.int64)
        if pool is not None and budget.clean:
            self._chosen = draw_clean(budget, pool.labels, train_size, seed)
        if pool is not None and budget.incoming:
            self._incoming = self._arrive(pool, trigger)

    def _arrive(
        self, pool: ImageSet, trigger: Callable[[Tensor, Tensor, Tensor], Tensor] | None
    ) -> Resident:
        """Incoming images, triggered and clean in turn; their labels stay with the evaluation."""
        index = others(len(pool), self._chosen, self.seed)[: self.budget.incoming]
        part = pool.subset(index).resident()
        unknown = torch.full_like(part.labels, -1)
        if trigger is None:
            return Resident(part.images, unknown)
        stamped = trigger(to_float(part.images), part.labels, index).mul(255).round().byte()
        even = (torch.arange(len(index)) % 2 == 0)[:, None, None, None]
        return Resident(torch.where(even, stamped.cpu(), part.images), unknown)

    def _refuse(self, what: str) -> BudgetError:
        return BudgetError(
            f"budget={self.budget.name} grants no {what}; choose a budget that does "
            "(pct1, pct5, one_per_class, poisoned, incoming) or a data-free defense (dhbe, clp)"
        )

    def _split(self) -> tuple[Tensor, Tensor]:
        if not len(self._chosen):
            raise self._refuse("clean images")
        rng = generator(self.seed, "validation")
        shuffled = self._chosen[torch.randperm(len(self._chosen), generator=rng)]
        held = max(1, round(VALIDATION_SHARE * len(shuffled)))
        return shuffled[held:], shuffled[:held]

    def _images(self, index: Tensor) -> ImageSet:
        assert self._pool is not None
        return self._pool.subset(index)

    def clean(self, *, hold_out_validation: bool = False) -> ImageSet:
        """The granted clean images; without those of ``validation()`` if they are held out.

        Raises:
            BudgetError: there are none, or none besides those held out.
        """
        fit, held = self._split()
        if hold_out_validation and not len(fit):
            raise BudgetError(
                f"budget={self.budget.name}: one clean image cannot both train and validate; "
                "choose a larger budget or defense.selection=fixed"
            )
        return self._images(fit if hold_out_validation else torch.cat([fit, held]))

    def validation(self) -> ImageSet:
        """A fifth of the granted clean images, at least one, for choosing thresholds and epochs."""
        return self._images(self._split()[1])

    def poisoned(self) -> Resident:
        """The poisoned training set, with the labels the attacker gave it."""
        if self._poisoned is None:
            raise self._refuse("poisoned training set")
        return self._poisoned

    def incoming(self) -> Resident:
        """Inputs seen at inference time, some of them triggered; all labels are -1."""
        if self._incoming is None:
            raise self._refuse("incoming images")
        return self._incoming

    def oracle(self, network: nn.Module) -> dict[str, float]:
        """``acc`` and ``asr`` on the test set: no defender can know them.

        Raises:
            BudgetError: the defense's selection is not ``oracle``.
            ConfigError: no test image counts for one of the two.
        """
        if self._oracle is None:
            raise BudgetError(
                "the test set serves evaluation alone; defense.selection=oracle opens it and marks "
                "the result as a best case"
            )
        found = self._oracle(network)
        if not {"acc", "asr"} <= found.keys():
            raise got(
                "defense.selection",
                "oracle",
                "fixed or validation, because no test image here counts for the attack's success",
            )
        return found


def draw_clean(budget: Budget, labels: Tensor, train_size: int, seed: int) -> Tensor:
    """Positions (n,) of the granted clean images in the pool, balanced over the classes.

    Args:
        labels: of the pool (N,).
        train_size: number of images that ``budget.fraction`` refers to.

    Raises:
        BudgetError: the pool is too small.
    """
    rng = generator(seed, "defender")
    if budget.per_class:
        smallest = int(labels.bincount().min())
        if budget.per_class > smallest:
            raise BudgetError(
                f"budget={budget.name}: {budget.per_class} clean images per class, but the "
                f"defender's pool holds {smallest} of the rarest class; raise "
                "data.pool_fraction or choose a smaller budget"
            )
        picks = [(labels == c).nonzero().flatten() for c in labels.unique()]
        return torch.cat(
            [p[torch.randperm(len(p), generator=rng)[: budget.per_class]] for p in picks]
        )
    count = round(budget.fraction * train_size)
    # Whole tracks make a grouped pool overshoot or undershoot its share by a few images.
    if count > len(labels) * 1.01 + 1:
        raise BudgetError(
            f"budget={budget.name}: {count} clean images, but the defender's pool holds "
            f"{len(labels)}; raise data.pool_fraction or choose a smaller budget"
        )
    return proportional(labels, count, rng)


def others(size: int, chosen: Tensor, seed: int) -> Tensor:
    """Positions of the pool that are not ``chosen`` (n,), shuffled; incoming ones come first."""
    free = torch.ones(size, dtype=torch.bool)
    free[chosen] = False
    rest = free.nonzero().flatten()
    return rest[torch.randperm(len(rest), generator=generator(seed, "incoming"))]


def not_granted(budget: Budget, labels: Tensor, train_size: int, seed: int) -> Tensor:
    """Positions (M,) of the pool, of labels (N,), that this defender never sees in any form.

    Raises:
        BudgetError: there are none.
    """
    chosen = draw_clean(budget, labels, train_size, seed) if budget.clean else labels[:0]
    rest = others(len(labels), chosen, seed)[budget.incoming :]
    if not len(rest):
        raise BudgetError(
            f"budget={budget.name}: grants all {len(labels)} images of the defender's pool, none "
            "is left to judge by; choose a smaller budget or raise data.pool_fraction"
        )
    return rest
