"""Caveats of a result on a foreign checkpoint: what was assumed, left out or cannot be known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from dhbe.contracts.attack import Attack
from dhbe.data import Splits
from dhbe.evaluation.evidence import Probe
from dhbe.evaluation.metrics import Predictions


def caveats(
    *,
    assumed: Sequence[str],
    splits: Splits | None,
    attack: Attack,
    probe: Probe | None,
    before: Predictions | None,
) -> list[str]:
    """The notes on a run whose victim was not trained here.

    Args:
        assumed: what the victim's source does not say and was assumed.
        before: of the victim, where there are test images.
    """
    found = [*assumed, *_about_data(splits), *_about_trigger(attack)]
    classes = attack.spec.classes
    if probe is not None and classes > probe.images:
        found.append(
            f"the evidence is about images of the first {probe.images} of {classes} classes; "
            f"probe.images={classes} shows all"
        )
    if before is not None and before.triggered is not None:
        found.append(_about_moves(before.clean, before.triggered, classes))
    return found


def _about_data(splits: Splits | None) -> Iterator[str]:
    if splits is not None:
        yield from splits.notes
    if splits is not None and splits.skipped:
        shown = ", ".join(splits.skipped[:8])
        yield f"{len(splits.skipped)} unreadable images were skipped: {shown}"
    if splits is None or not len(splits.test):
        yield (
            "without test images the accuracy of neither network is known; generated images only "
            "show that the two agree on what the networks themselves imagine. data.test=FOLDER "
            "measures it"
        )


def _about_trigger(attack: Attack) -> Iterator[str]:
    if not attack.active:
        yield (
            "without the trigger no attack success rate can be measured. The reach of the trigger "
            "network speaks of small patches only: a class that stands out is a reason to suspect "
            "a backdoor, none standing out is no proof of its absence"
        )


def _about_moves(clean: np.ndarray, triggered: np.ndarray, classes: int) -> str:
    moved = triggered[triggered != clean]
    known = f"the trigger moves {len(moved)} of {len(clean)} images to another class"
    if len(moved):
        counts = np.bincount(moved, minlength=classes)
        known += f", {counts.max()} of them to class {counts.argmax()}"
    return f"{known}; success is counted as attack.target_rule and target_class say"
