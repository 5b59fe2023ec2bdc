"""No attack: clean training, the reference for every accuracy drop."""

from __future__ import annotations

import torch
from torch import Tensor

from dhbe.attack import Attack
from dhbe.types import CLEAN


class NoAttack(Attack):
    """Poisons nothing; the options of poisoning attacks are accepted and have no effect."""

    active = False

    def trigger(self, x: Tensor, *, y: Tensor, index: Tensor) -> Tensor:
        del y, index
        return x

    def select(self, y: Tensor, rng: torch.Generator) -> Tensor:
        del rng
        return torch.full_like(y, CLEAN, dtype=torch.int8)
