"""Search for the best rectangle in an image by differential evolution."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import OptimizeResult, differential_evolution
from torch import Tensor


def best_rectangle(
    fitness: Callable[[Tensor], Tensor],
    inside: Tensor,
    *,
    margin: int,
    least_side: int,
    population: int,
    generations: int,
    seed: int,
) -> Tensor | None:
    """Mask (size, size) bool of the fittest rectangle, or None if none is above zero.

    Strategy rand/1/bin over whole numbers, all rectangles of a generation at once.

    Args:
        fitness: masks (S, size, size) -> (S,).
        inside: (size, size) bool; the box around it and a margin bounds the search.
    """
    size, device = inside.shape[-1], inside.device
    box = top, left, bottom, right = bounding_box(inside, margin=margin)
    bounds = [(top, max(top, bottom - least_side)), (left, max(left, right - least_side))]
    bounds += [
        (least_side, max(least_side, end - start))
        for start, end in zip(box[:2], box[2:], strict=True)
    ]

    @torch.no_grad()
    def cost(values: np.ndarray) -> np.ndarray:
        where = rectangles(torch.from_numpy(values.reshape(4, -1).round()).long(), size)
        return np.asarray(-fitness(where.to(device)).cpu())

    best = differential_evolution(
        cost,
        bounds,
        strategy="rand1bin",
        maxiter=generations,
        popsize=max(2, population // 4),
        mutation=0.5,
        recombination=0.7,
        rng=np.random.default_rng(seed),
        polish=False,
        updating="deferred",
        vectorized=True,
        integrality=np.ones(4, dtype=bool),
        tol=0,
        callback=Stagnation(),
    )
    if best.fun >= 0:
        return None
    return rectangles(torch.from_numpy(best.x.round()).long()[:, None], size)[0].to(device)


class Stagnation:
    """Ends the evolution after 10 generations without progress of 1e-6."""

    def __init__(self) -> None:
        self.best, self.idle = float("inf"), 0

    def __call__(self, intermediate_result: OptimizeResult) -> bool:
        self.idle = 0 if self.best - intermediate_result.fun > 1e-6 else self.idle + 1
        self.best = min(self.best, intermediate_result.fun)
        return self.idle >= 10


def rectangles(values: Tensor, size: int) -> Tensor:
    """Masks (S, size, size) bool of rectangles (4, S): top, left, height, width."""
    at = torch.arange(size)
    top, left, height, width = (v[:, None] for v in values)
    rows = (at >= top) & (at < top + height)
    columns = (at >= left) & (at < left + width)
    inside: Tensor = rows[:, :, None] & columns[:, None, :]
    return inside


def bounding_box(where: Tensor, *, margin: int) -> tuple[int, int, int, int]:
    """Smallest (top, left, bottom, right) around what is true in ``where`` (H, W), and a margin."""
    size = where.shape[-1]
    rows, columns = where.nonzero(as_tuple=True)
    top, left = (max(0, int(v.min()) - margin) for v in (rows, columns))
    bottom, right = (min(size, int(v.max()) + 1 + margin) for v in (rows, columns))
    return top, left, bottom, right
