"""What detectors share: outliers, and how sure a network is."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn


def outliers(values: np.ndarray, limit: float, *, side: Literal["above", "below"]) -> list[int]:
    """Positions farther than ``limit`` scaled deviations from the median, on one side of it.

    The deviation is 1.4826 times the median absolute deviation, which is the standard deviation of
    a normal distribution (Neural Cleanse's anomaly index). Of an even number of values the lower
    of the two middle ones is the median, as in the official codes (``torch.median``).
    """
    away = values - lower_median(values)
    scaled = away / max(1.4826 * lower_median(np.abs(away)), 1e-12)
    return np.flatnonzero(scaled > limit if side == "above" else scaled < -limit).tolist()


def lower_median(values: np.ndarray) -> float:
    """The middle value, of an even number the lower one of both."""
    return float(np.sort(values)[(len(values) - 1) // 2])


@torch.no_grad()
def confident(network: nn.Module, images: Tensor, label: int, confidence: float) -> Tensor:
    """(B,): 1.0 where the probability of the class exceeds ``confidence``, else 0.0."""
    sure: Tensor = network(images).softmax(dim=1)[:, label] > confidence
    return sure.double()
