"""Training schedules: optimisers, shapes of the learning rate, numbers of epochs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le, Len, Lt, MinLen
from torch import nn

PEAK = 0.2
"""Fraction of the budget in which a one-cycle rate rises."""


class Shape(ABC):
    """Course of a learning rate over a budget."""

    @abstractmethod
    def __call__(self, progress: float) -> float:
        """Factor on the learning rate after a fraction ``progress`` of the budget."""


@dataclass(frozen=True, kw_only=True)
class Constant(Shape):
    """The same rate throughout."""

    def __call__(self, progress: float) -> float:
        """1."""
        del progress
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Steps(Shape):
    """Multiplied by ``decay`` at each of ``milestones`` (fractions of the budget)."""

    milestones: Annotated[list[Annotated[float, Gt(0), Le(1)]], MinLen(1)]
    decay: Annotated[float, Gt(0), Le(1)]

    def __call__(self, progress: float) -> float:
        """``decay`` to the number of milestones passed."""
        return float(self.decay ** sum(progress >= m for m in self.milestones))


@dataclass(frozen=True, kw_only=True)
class Cosine(Shape):
    """Falls along half a cosine to the fraction ``end``."""

    end: Annotated[float, Ge(0), Le(1)]

    def __call__(self, progress: float) -> float:
        """From 1 to ``end``."""
        return self.end + (1 - self.end) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True, kw_only=True)
class Linear(Shape):
    """Falls in a straight line to 0."""

    def __call__(self, progress: float) -> float:
        """From 1 to 0."""
        return 1 - progress


@dataclass(frozen=True, kw_only=True)
class OneCycle(Shape):
    """Rises from 0 over the first fifth, then falls to 0, both linearly."""

    def __call__(self, progress: float) -> float:
        """From 0 to 1 and back."""
        return progress / PEAK if progress < PEAK else (1 - progress) / (1 - PEAK)


@dataclass(frozen=True, kw_only=True)
class Stairs(Shape):
    """Another shape, held for each of ``steps`` equal parts of the budget at that part's start."""

    shape: Shape
    steps: Annotated[int, Ge(1)]

    def __call__(self, progress: float) -> float:
        """The shape's value where the part began."""
        return self.shape(math.floor(progress * self.steps) / self.steps)


@dataclass(frozen=True, kw_only=True)
class Waves(Shape):
    """Another shape, run through ``times`` times, forwards and backwards in turn."""

    shape: Shape
    times: Annotated[float, Gt(0)]

    def __call__(self, progress: float) -> float:
        """The shape's value at a place that goes from 0 to 1 and back."""
        return self.shape(1 - abs(1 - (progress * self.times) % 2))


@dataclass(kw_only=True)
class Learning(ABC):
    """An optimiser and its learning rate; the caller sets the length."""

    learning_rate: Annotated[float, Gt(0)]
    weight_decay: Annotated[float, Ge(0)]
    shape: Shape

    def factor(self, progress: float) -> float:
        """Factor on the learning rate after a fraction ``progress`` of the budget."""
        return self.shape(progress)

    @abstractmethod
    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        """Optimiser over all parameters that require a gradient."""


@dataclass(kw_only=True)
class SGD(Learning):
    """Stochastic gradient descent."""

    momentum: Annotated[float, Ge(0), Le(1)]
    nesterov: bool

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


@dataclass(kw_only=True)
class Adam(Learning):
    """Adam (Kingma & Ba 2015)."""

    betas: Annotated[list[Annotated[float, Ge(0), Lt(1)]], Len(2, 2)]

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        """Adam over all parameters that require a gradient."""
        first, second = self.betas
        return torch.optim.Adam(
            [p for p in network.parameters() if p.requires_grad],
            lr=self.learning_rate,
            betas=(first, second),
            weight_decay=self.weight_decay,
        )


@dataclass(kw_only=True)
class Schedule(Learning):
    """A training of its own: how a network learns, in which batches and for how many epochs."""

    epochs: Annotated[int, Ge(1)]
    batch_size: Annotated[int, Ge(2)]


@dataclass(kw_only=True)
class SGDSchedule(SGD, Schedule):
    """A training with SGD."""


@dataclass(kw_only=True)
class AdamSchedule(Adam, Schedule):
    """A training with Adam."""


@dataclass(frozen=True, kw_only=True)
class Player:
    """A network that learns beside another one, within its budget."""

    network: nn.Module
    schedule: Learning
