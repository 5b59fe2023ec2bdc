"""Optimisers and learning rates over a budget of epochs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le, Len, Lt
from torch import nn


class Schedule:
    """SGD and its learning rate over a budget of epochs, in fractions of that budget.

    Args:
        schedule: ``multistep`` multiplies by ``decay`` at each of ``milestones`` (fractions);
            ``cosine`` falls to ``end`` of it; ``onecycle`` rises over the first fifth, then falls
            linearly.
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
        end: Annotated[float, Ge(0), Le(1)] = 0.0,
    ) -> None:
        self.epochs, self.batch_size = epochs, batch_size
        self.learning_rate, self.momentum, self.nesterov = learning_rate, momentum, nesterov
        self.weight_decay = weight_decay
        self.schedule, self.milestones, self.decay = schedule, milestones, decay
        self.end = end

    def factor(self, progress: float) -> float:
        """Factor on the learning rate after a fraction ``progress`` of the budget."""
        if self.schedule == "multistep":
            return float(self.decay ** sum(progress >= m for m in self.milestones))
        if self.schedule == "cosine":
            return self.end + (1 - self.end) * 0.5 * (1 + math.cos(math.pi * progress))
        peak = 0.2
        return progress / peak if progress < peak else (1 - progress) / (1 - peak)

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        """SGD over all parameters that require a gradient."""
        return torch.optim.SGD(
            [p for p in network.parameters() if p.requires_grad],
            lr=self.learning_rate,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
            fused=True,
        )


class AdamSchedule(Schedule):
    """Adam instead of SGD.

    Args:
        epochs: of a training of its own; a player beside the victim follows the victim's budget.
    """

    def __init__(
        self,
        *,
        epochs: Annotated[int, Ge(1)],
        batch_size: Annotated[int, Ge(2)],
        learning_rate: Annotated[float, Gt(0)],
        betas: Annotated[list[Annotated[float, Ge(0), Lt(1)]], Len(2, 2)],
        weight_decay: Annotated[float, Ge(0)] = 0.0,
        schedule: Literal["multistep", "cosine", "onecycle"],
        milestones: list[Annotated[float, Gt(0), Le(1)]],
        decay: Annotated[float, Gt(0), Le(1)],
    ) -> None:
        super().__init__(
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            momentum=0.0,
            nesterov=False,
            weight_decay=weight_decay,
            schedule=schedule,
            milestones=milestones,
            decay=decay,
        )
        self.betas = betas

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        """Adam over all parameters that require a gradient."""
        first, second = self.betas
        return torch.optim.Adam(
            [p for p in network.parameters() if p.requires_grad],
            lr=self.learning_rate,
            betas=(first, second),
            weight_decay=self.weight_decay,
        )


@dataclass(frozen=True, kw_only=True)
class Player:
    """A network and how it learns."""

    network: nn.Module
    schedule: Schedule
