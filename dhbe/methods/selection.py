"""Choosing a threshold, a stage or an epoch, with what the defender owns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from dhbe.data import DefenderData, ImageSet
from dhbe.methods.masks import batch_norms, prune
from dhbe.models import Normalized
from dhbe.training.runtime import Runtime

Selection = Literal["fixed", "validation", "oracle"]
"""How a threshold or epoch is chosen: given beforehand, on the budget's validation part, or (marked
in every table) on the test set."""
Choice = TypeVar("Choice")
THRESHOLDS = [-1.0, *(i / 20 for i in range(19))]
"""Mask thresholds to try: none pruned, then 0, 0.05 ... 0.9."""


def accuracy(network: nn.Module, images: ImageSet, runtime: Runtime) -> float:
    """Share, 0 to 1, of images that the network classifies as their label, in eval mode."""
    predicted = runtime.forward(network, images).argmax(dim=1)
    return int((predicted == runtime.labels(images)).sum()) / len(images)


def choose(
    network: Normalized,
    choices: Sequence[Choice],
    apply: Callable[[Normalized, Choice], object],
    *,
    fixed: Choice,
    selection: Selection,
    max_drop: float,
    data: DefenderData,
    runtime: Runtime,
    relative: bool = False,
    measure: Callable[[Normalized], float] | None = None,
) -> tuple[Choice, Normalized]:
    """One of ``choices``, ordered from mild to strong, and the network it was applied to.

    ``fixed``: the given one. ``validation``: the last whose accuracy on the defender's validation
    images is at most ``max_drop`` below the untouched network's. ``oracle``: the one with the best
    DER on the test set (best-case figure; the row is marked).

    Args:
        apply: changes a copy of the network, in place.
        relative: ``max_drop`` is a share of the untouched network's accuracy, not a difference.
        measure: a faster way to the accuracy on the validation images.
    """

    def applied(choice: Choice) -> Normalized:
        candidate = copy.deepcopy(network)
        apply(candidate, choice)
        return candidate

    if selection == "fixed":
        return fixed, applied(fixed)
    if selection == "oracle":
        truth, results = data.oracle(network), [data.oracle(applied(c)) for c in choices]
        scores = [
            max(0.0, truth["asr"] - r["asr"]) - max(0.0, truth["acc"] - r["acc"]) for r in results
        ]
        best = choices[scores.index(max(scores))]
        return best, applied(best)
    held = data.validation()
    measure = measure or (lambda net: accuracy(net, held, runtime))
    untouched = measure(network)
    least = untouched * (1 - max_drop) if relative else untouched - max_drop
    best, repaired = choices[0], applied(choices[0])
    for choice in choices[1:]:
        candidate = applied(choice)
        if measure(candidate) < least:
            break
        best, repaired = choice, candidate
    return best, repaired


def prune_by_masks(
    network: Normalized, masks: Sequence[Tensor], *, method: str, fixed: float, **how: Any
) -> Normalized:
    """Prune the channels with masks at or below a threshold, of 0, 0.05 ... 0.9 (ANP, RNP).

    Args:
        masks: (C,) of each BatchNorm.
        fixed: threshold for ``selection=fixed``.
        how: ``selection``, ``max_drop``, ``data`` and ``runtime``, as in ``choose``.
    """

    def cut(net: Normalized, threshold: float) -> None:
        prune(batch_norms(net, method=method), masks, threshold)

    threshold, network = choose(network, THRESHOLDS, cut, fixed=fixed, **how)
    total = sum(int((m <= threshold).sum()) for m in masks)
    how["runtime"].recorder.notes.append(f"{method} pruned {total} channels, threshold {threshold}")
    return network
