"""The contract of a defense: a suspect and budgeted data in, a purified network out."""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from typing import ClassVar, final

import torch

from dhbe.core.errors import ArtefactError, BudgetError, DivergenceError
from dhbe.core.rng import generator
from dhbe.core.types import DataSpec, Suspect
from dhbe.data import Budget, DefenderData
from dhbe.methods.selection import Selection
from dhbe.models import Normalized
from dhbe.training.runtime import Runtime

log = logging.getLogger(__name__)


class Defense(ABC):
    """A backdoor-erasing method; subclasses implement ``repair``."""

    needs: ClassVar[Budget] = Budget()
    """The least that the method can work with; checked before any data is read."""
    selection: Selection = "fixed"
    idle: bool = False
    """Whether leaving every weight as it is is what the method is for."""

    @classmethod
    def check(cls, budget: Budget) -> None:
        """Refuse a budget that grants less than the method needs.

        Raises:
            BudgetError: names what is missing.
        """
        if missing := budget.missing(cls.needs):
            raise BudgetError(
                f"budget={budget.name}: {cls.__name__} needs {missing}; set budget=pct1 or another "
                "that grants it (one_per_class, pct1, pct2, pct5, holdout5), or a defense that "
                "needs no data"
            )

    def fits(self, spec: DataSpec) -> None:
        """Refuse, before any data is read, a data set that the method's settings do not fit.

        Raises:
            ConfigError: names the key.
        """

    @abstractmethod
    def repair(self, network: Normalized, data: DefenderData, runtime: Runtime) -> Normalized:
        """Purify ``network``, a private copy of the suspect's in eval mode; may work in place."""

    @final
    def __call__(self, suspect: Suspect, data: DefenderData, runtime: Runtime) -> Normalized:
        """Purified network in eval mode, of the suspect's interface; the suspect stays untouched.

        Raises:
            BudgetError: the budget does not cover the method's needs.
            ArtefactError: the suspect has NaN or infinite weights.
            DivergenceError: the purified network has, or answers noise with such logits.
        """
        self.check(data.budget)
        assert isinstance(suspect.network, Normalized)
        if not all_finite(suspect.network):
            raise ArtefactError(
                f"the suspect network ({suspect.architecture}) holds NaN or infinite weights; "
                "no defense can start from it"
            )
        network = copy.deepcopy(suspect.network).to(runtime.device, runtime.dtype).eval()
        network.requires_grad_(True)  # a part may be frozen
        repaired = self.repair(network, data, runtime).eval()
        if not all_finite(repaired):
            raise DivergenceError(
                f"{type(self).__name__} produced NaN or infinite weights; lower its learning rate"
            )
        if not self.idle and unchanged(suspect.network, repaired):
            warning = (
                f"WARNING: {type(self).__name__} changed no weight: the purified network is the "
                "suspect, with whatever backdoor it has. Use a stricter setting or another defense "
                "(dhbe_guided needs no images)"
            )
            log.warning(warning)
            runtime.recorder.notes.insert(0, warning)
        noise = torch.rand((2, *suspect.spec.shape), generator=generator(0, "probe"))
        with torch.no_grad():
            logits = repaired(noise.to(runtime.device, runtime.dtype))
        assert logits.shape == (2, suspect.spec.classes), "a repair must keep the interface"
        if not bool(logits.isfinite().all()):
            raise DivergenceError(
                f"{type(self).__name__} produced a network whose logits are NaN or infinite; lower "
                "its learning rate"
            )
        return repaired.requires_grad_(True)


def all_finite(network: torch.nn.Module) -> bool:
    """Whether no weight and no floating-point buffer holds NaN or infinity."""
    values = (t for t in network.state_dict().values() if t.is_floating_point())
    return all(bool(t.isfinite().all()) for t in values)


def unchanged(before: torch.nn.Module, after: torch.nn.Module) -> bool:
    """Whether two networks have the same keys, and equal weights and buffers under them."""
    old, new = before.state_dict(), after.state_dict()
    return old.keys() == new.keys() and all(
        torch.equal(v.to(new[k]), new[k]) for k, v in old.items()
    )
