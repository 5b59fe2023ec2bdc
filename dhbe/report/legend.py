"""What the columns and rates of reports mean, and the class names of known data sets."""

from __future__ import annotations

import re
from typing import Any

import yaml

METRICS = {
    "acc": "Clean accuracy: share of clean test images classified as their label. "
    "Higher is better.",
    "asr": "Attack success rate: share of triggered test images, whose true class is not the goal, "
    "that are classified as the goal. Lower is better after a defense.",
    "asr_conditional": "ASR over the images that this network classifies correctly when clean.",
    "ra": "Robust accuracy: share of triggered test images classified as their true class.",
    "der": "Defense effectiveness: (max(0, drop of ASR) - max(0, drop of ACC) + 1) / 2. 0.5 is no "
    "change; higher is better.",
}
"""Metric -> one sentence."""
COLUMNS = {
    "attack": "The attack that made the victim, with options that tell it from others so named.",
    "defense": "The method, with options that tell it from others so named.",
    "budget": "What the defender was granted.",
    "selection": "How thresholds were chosen: fixed, validation (granted images) or oracle (test "
    "set).",
    "scale": "quick, cpu or paper: settings fitted to the machine, or as published.",
    "n": "Number of values behind the mean.",
    "seed": "Seed of the run; it determines every draw.",
    "rank": "Place by DER; open where 95 % intervals overlap.",
    "victims": "Number of victims that both defenses were run on.",
    "clean_baseline": "ASR of a clean-trained network under the same trigger.",
    "seconds": "Wall seconds.",
    "poison_rate": "Share of all training images that are poisoned.",
    "band": "Whether the measured mean is near the published figure.",
}
"""Column, or the beginning of its name -> one sentence."""
CLASSES = {
    "cifar10": "airplane automobile bird cat deer dog frog horse ship truck",
    "fashion_mnist": "T-shirt trouser pullover dress coat sandal shirt sneaker bag boot",
    "imagenette": "tench springer cassette-player chainsaw church horn garbage-truck gas-pump "
    "golf-ball parachute",
}
"""Known data set -> names of its classes, in order."""


def explained(column: str) -> str:
    """Sentence on a column of a table; empty for names that explain themselves."""
    name = column.lower()
    for key, text in COLUMNS.items():
        if name == key or (len(key) > 1 and name.startswith(key)):
            return text
    words = re.split(r"[^a-z_]+|(?:victim|purified|published|difference)[_ ]", name)
    found = [METRICS[w] for w in words if w in METRICS]
    return " ".join(dict.fromkeys(found))


def class_names(data: str, config: str) -> list[str]:
    """Names of the classes in order; empty where they are only numbers.

    Args:
        data: the data set as ``metrics.json`` names it.
        config: text of the run's ``config.yaml``; a user's own list takes precedence.
    """
    tree: Any = yaml.safe_load(config)
    node = tree.get("data") if isinstance(tree, dict) else None
    listed = node.get("class_names") if isinstance(node, dict) else None
    if isinstance(listed, list):
        return [str(name) for name in listed]
    return CLASSES.get(data.removesuffix("_mini"), "").split()
