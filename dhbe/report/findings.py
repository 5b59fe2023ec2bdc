"""The first screen of a checkpoint's report: what was found, done, lost and left; the next step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dhbe.report.folder import percent

LITTLE = 0.5
"""Agreement of the two networks below which a reader has to be warned."""
COSTLY = 0.05
"""Loss of accuracy from which a reader has to be warned."""
REMAINS = 0.1
"""Attack success rate after the defense from which it has failed."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A sentence or two under a title; ``alarming`` ones are shown in the colour of warnings."""

    title: str
    text: str
    alarming: bool = False


def findings(metrics: dict[str, Any], names: Sequence[str]) -> list[Finding]:
    """What a reader who has to act needs first; empty where there is no evidence of a checkpoint.

    Args:
        metrics: of a run with ``evidence``.
        names: of the classes, in order; may be empty.
    """
    if metrics.get("evidence") is None:
        return []
    if metrics.get("idle"):  # nothing can have been lost
        return [found(metrics, names), done(metrics), following(metrics)]
    return [
        found(metrics, names),
        done(metrics),
        cost(metrics),
        left(metrics, names),
        following(metrics),
    ]


def found(metrics: dict[str, Any], names: Sequence[str]) -> Finding:
    """The detector's verdict."""
    detected = metrics.get("suspected") or {}
    suspected = detected.get("classes")
    if suspected is None:
        text = f"defense={metrics['defense']} does not look for the attacker's target class."
    elif suspected:
        listed = ", ".join(called(c, names) for c in suspected)
        text = (
            f"{listed} {'stands' if len(suspected) == 1 else 'stand'} out: triggers that the "
            "defense sought move images of other classes there, as the trigger of a backdoor does. "
            f"The score is not a calibrated probability{ranked(detected)}; the notes have details."
        )
    else:
        text = (
            "No class stands out. That does not prove that there is no backdoor: some kinds of "
            f"triggers are not sought, and some that are sought are missed{ranked(detected)}."
        )
    return Finding(title="Found", text=text, alarming=bool(suspected))


def ranked(detected: dict[str, Any]) -> str:
    """The two highest scores, where all classes have one."""
    scores = sorted(detected.get("scores") or [], reverse=True)
    if len(scores) < 2:
        return ""
    return f" (highest score of a class {scores[0]:.1f}, the next {scores[1]:.1f})"


def done(metrics: dict[str, Any]) -> Finding:
    """What the defense did to the weights."""
    weights: dict[str, float] = metrics["evidence"]["weights"]
    if metrics.get("idle"):
        text = (
            f"defense={metrics['defense']} leaves the network as it is; no purified file in the "
            "layout of the given one was written. task=purify erases."
        )
        return Finding(title="Done", text=text)
    changed = {name: change for name, change in weights.items() if change > 0}
    if not changed:
        text = f"defense={metrics['defense']} changed no weight: the purified file is the suspect."
        return Finding(title="Done", text=text, alarming=True)
    most = max(changed, key=lambda name: changed[name])
    text = (
        f"defense={metrics['defense']} changed {len(changed)} of {len(weights)} layers, most "
        f"{most}, by {percent(changed[most])} of its norm."
    )
    return Finding(title="Done", text=text)


def cost(metrics: dict[str, Any]) -> Finding:
    """What the defense cost, as far as it was measured."""
    before, after = (metrics[role]["acc"] for role in ("victim", "purified"))
    if before is not None:
        total = metrics["counts"]["purified"]["acc"]["total"]
        text = f"Accuracy on {total} test images went from {percent(before)} to {percent(after)}."
        return Finding(title="Cost", text=text, alarming=after < before - COSTLY)
    same = metrics["evidence"]["agreement"]
    text = (
        f"Accuracy: –, no test images were given. Of {same['total']} generated images both "
        f"networks give the same class to {same['hits']}, which is no estimate of accuracy."
    )
    few = same["hits"] < LITTLE * same["total"]
    return Finding(title="Cost", text=text, alarming=few)


def left(metrics: dict[str, Any], names: Sequence[str]) -> Finding:
    """What may still be there."""
    asr = metrics["purified"]["asr"]
    if asr is not None:
        text = f"The given trigger still moves {percent(asr)} of the test images to its target."
        return Finding(title="Left", text=text, alarming=asr > REMAINS)
    shares = {}
    for role, classes in metrics["evidence"]["reach"].items():
        rates = [c["hits"] / c["total"] if c["total"] else 0.0 for c in classes]
        highest = max(range(len(rates)), key=lambda c: rates[c])
        class_ = called(highest, names)
        shares[role] = f"{percent(rates[highest])} (c{class_[1:]})"
    text = (
        f"Small patches move up to {shares['purified']} of generated images into one class; "
        f"before, up to {shares['victim']}."
    )
    text += (
        " Triggers of other kinds, such as warps or those that differ from image to image, were "
        "not tried."
    )
    return Finding(title="Left", text=text)


def following(metrics: dict[str, Any]) -> Finding:
    """The next step."""
    if metrics.get("idle"):
        return Finding(
            title="Next", text="To erase a backdoor: task=purify, with the same options."
        )
    steps = []
    if not any(metrics["evidence"]["weights"].values()):
        steps.append(
            "try defense=dhbe_guided, or give clean images (data.clean=FOLDER defense=ft_sam)"
        )
    if metrics["victim"]["acc"] is None:
        steps.append("measure accuracy before you use the purified file: data.test=FOLDER")
    if metrics["purified"]["asr"] is None:
        steps.append("if you know a trigger, measure it: trigger=PICTURE data.test=FOLDER")
    elif metrics["purified"]["asr"] > REMAINS:
        steps.append("try another defense: the trigger still works")
    steps.append("keep the original file")
    text = "; ".join(steps)
    return Finding(title="Next", text=f"{text[0].upper()}{text[1:]}.")


def called(number: int, names: Sequence[str]) -> str:
    """Class 3, with its name where it is known."""
    return f"Class {number} ({names[number]})" if number < len(names) else f"Class {number}"
