"""Choosing a threshold, a stage or an epoch, with what the defender owns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import torch
from torch import nn

from dhbe.data import DefenderData, ImageSet, to_float
from dhbe.models import Normalized
from dhbe.runtime import Runtime

Selection = Literal["fixed", "validation", "oracle"]
"""How a threshold or epoch is chosen: given beforehand, on the budget's validation part, or (marked
in every table) with eyes on the test set."""
Choice = TypeVar("Choice")
THRESHOLDS = [-1.0, *(i / 20 for i in range(19))]
"""Mask thresholds to try: none pruned, then 0, 0.05 ... 0.9 (ANP, RNP)."""


@torch.no_grad()
def accuracy(network: nn.Module, images: ImageSet, runtime: Runtime) -> float:
    """Share of images classified correctly, in eval mode."""
    training = network.training
    network.eval()
    hits = 0
    for raw, index in images.batches(torch.arange(len(images)), 500):
        logits = network(to_float(raw.to(runtime.device)).to(runtime.dtype))
        hits += int((logits.argmax(1).cpu() == images.labels[index.cpu()]).sum())
    network.train(training)
    return hits / len(images)


def strongest(
    network: Normalized,
    choices: Sequence[Choice],
    apply: Callable[[Normalized, Choice], object],
    *,
    data: DefenderData,
    runtime: Runtime,
    selection: Selection,
    max_drop: float,
) -> tuple[Choice, Normalized]:
    """The last of ``choices``, ordered from mild to strong, that keeps accuracy; and its network.

    ``validation``: the strongest whose accuracy on the defender's validation images is at most
    ``max_drop`` below the untouched network's. ``oracle``: the one with the best DER on the test
    set (best-case figure; the row is marked).

    Args:
        apply: changes a copy of the network, in place.
    """
    assert selection != "fixed"
    before = accuracy(network, data.validation(), runtime) if selection == "validation" else 0.0
    truth = data.oracle(network) if selection == "oracle" else {}
    best: tuple[Choice, Normalized] | None = None
    best_score = -1.0
    for choice in choices:
        candidate = copy.deepcopy(network)
        apply(candidate, choice)
        if selection == "validation":
            if best and accuracy(candidate, data.validation(), runtime) < before - max_drop:
                break
            best = (choice, candidate)
        else:
            found = data.oracle(candidate)
            score = max(0.0, truth["asr"] - found["asr"]) - max(0.0, truth["acc"] - found["acc"])
            if score > best_score:
                best, best_score = (choice, candidate), score
    assert best is not None
    return best
