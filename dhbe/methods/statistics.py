"""What detectors share: outliers, and how sure a network is."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn


def outliers(values: np.ndarray, limit: float, *, side: Literal["above", "below"]) -> list[int]:
    """Positions farther than ``limit`` scaled deviations from the median, on one side of it.

    The deviation is 1.4826 times the median absolute deviation, which is the standard deviation of
    a normal distribution (Neural Cleanse's anomaly index).
    """
    away = values - np.median(values)
    scaled = away / max(1.4826 * float(np.median(np.abs(away))), 1e-12)
    return np.flatnonzero(scaled > limit if side == "above" else scaled < -limit).tolist()


@torch.no_grad()
def confident(network: nn.Module, images: Tensor, label: int, confidence: float) -> Tensor:
    """1 for images that the network surely takes for a class, 0 for others (B,)."""
    sure: Tensor = network(images).softmax(dim=1)[:, label] > confidence
    return sure.double()
