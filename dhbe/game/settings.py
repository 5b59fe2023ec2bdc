"""Weights and rates of the game."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the losses: lambda_d1, lambda_tv1 and lambda_tv2 of the published code.

    The others are ours, 0 in the paper's game. ``balance`` keeps the generator from images that the
    teacher all puts into one class, ``statistics`` from images that its BatchNorms do not expect;
    ``faint`` is to the faint triggers what ``patch`` is to the trigger network's patches.
    """

    patch: float
    faint: float
    tv1: float
    tv2: float
    balance: float
    statistics: float


@dataclass(frozen=True, kw_only=True)
class LearningRates:
    """Learning rates, and the schedule they share."""

    student: float
    generator: float
    trigger_network: float
    faint: float
    """Of the faint triggers."""
    momentum: float
    weight_decay: float
    milestones: tuple[float, ...]
    """Fractions of the epochs after which all rates are multiplied by ``decay``."""
    decay: float
