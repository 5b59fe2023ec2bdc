"""Infer settings from a checkpoint: network, classes, image size, normalisation."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dhbe.checkpoint.loading import Checkpoint, fill
from dhbe.checkpoint.nesting import STATISTICS
from dhbe.checkpoint.pickles import shown
from dhbe.checkpoint.preprocessing import (
    MATERIAL,
    Verdict,
    apart,
    ruled_out,
    told,
)
from dhbe.checkpoint.recognition import OWN, recognised, sizes
from dhbe.config import schema as config
from dhbe.config.resolution import Resolved
from dhbe.core.errors import ConfigError, got
from dhbe.core.types import DataSpec
from dhbe.data.own import NORMALIZATIONS, statistics
from dhbe.models.interface import prepared

BUDGET = {"_target_": "dhbe.data.Budget"}
ROUNDED = 0.02
"""Normalisations that are closer are the same one, printed with fewer digits."""


def completed(tree: dict[str, Any], choices: Mapping[str, str]) -> Resolved:
    """Fill in all settings that the checkpoint determines.

    Other configs come back as they are. What neither config nor file says is told by the network's
    own statistics or assumed, and listed in ``victim.assumed``.

    Returns:
        config, and the names of the chosen configs.

    Raises:
        ArtefactError: the file is refused, or no known network fits it.
        ConfigError: several networks fit, none of file and config tells the classes, or they
            contradict each other.
    """
    node = tree.get("victim")
    if not isinstance(node, dict) or node.get("path", "???") == "???":
        return tree, dict(choices)
    checkpoint = Checkpoint(Path(node["path"]), node.get("key"))
    question = json.dumps([tree, checkpoint.file.digest()])
    if question not in _answers:
        _answers[question] = answered(checkpoint, tree)
    tree, found = copy.deepcopy(_answers[question])
    return tree, {**choices, **found}


_answers: dict[str, Resolved] = {}
"""Of this process, in which a run asks twice: for its name, and for itself."""


def answered(checkpoint: Checkpoint, tree: dict[str, Any]) -> Resolved:
    """The config with what its checkpoint says, and the names of the configs that this amounts to.

    Raises:
        ArtefactError, ConfigError: as ``completed``.
    """
    node, data, choices = tree["victim"], dict(tree["data"]), {}
    own = "normalization" in data
    model, name, notes = recognised(checkpoint, tree["model"], data)
    if name:
        choices["model"] = name
    network = config.build(model, **sizes(data))
    if model["_target_"] == OWN:
        notes += prepared(network, described(data))
    fill(network, checkpoint)
    notes += seen(checkpoint, network, data)
    if own:  # a folder of clean images is the budget, whatever share a paper asks for
        clean = data["clean"] is not None
        choices["budget"] = "own" if clean else "none"
        name = "own" if clean else "none (data.clean is not set)"
        tree = tree | {"budget": BUDGET | {"name": name, "fraction": float(clean)}}
    if checkpoint.others:
        listed = ", ".join(map(shown, sorted(checkpoint.others)[:8]))
        notes.append(f"{len(checkpoint.others)} tensors outside the network stay as is: {listed}")
    notes += checkpoint.notes
    victim = node | {"sha256": checkpoint.file.digest(), "assumed": notes}
    return tree | {"victim": victim, "data": data, "model": model}, choices


def described(data: Mapping[str, Any]) -> DataSpec:
    """The images, as far as shapes go."""
    zeros = (0.0,) * data["channels"]
    return DataSpec(
        name=data["name"],
        mean=zeros,
        std=zeros,
        flip=False,
        crop_padding=0,
        balanced=False,
        **sizes(data),
    )


def seen(checkpoint: Checkpoint, network: nn.Module, data: dict[str, Any]) -> list[str]:
    """Fill in the normalisation, and note where it was found.

    Raises:
        ConfigError: the config contradicts the file.
    """
    if found := checkpoint.normalization():
        return from_file(found, data)
    if "normalization" in data and data["normalization"] is None:
        data["normalization"] = said(checkpoint)
        if data["normalization"] is not None:
            return []
    verdict = told(network, **sizes(data))
    if "mean" in data:
        return replaced(network, verdict, data)
    if data.get("normalization") is None:
        return [chosen(verdict, data)]
    doubt = doubted(verdict, data)
    return [doubt] if doubt else []


def replaced(network: nn.Module, verdict: Verdict, data: dict[str, Any]) -> list[str]:
    """Replace the data set's normalisation by the one the network was trained with.

    Between normalisations that are nearly alike it counts only if it rules the data set's out.
    """
    given, preset = {k: list(data[k]) for k in STATISTICS}, verdict.preset
    if preset is None or (distance := apart(given, preset, data["channels"])) <= ROUNDED:
        return []
    images = {k: data[k] for k in ("channels", "image_size")}
    if distance < MATERIAL and not ruled_out(network, given, preset, **images):
        return []
    data["mean"], data["std"] = map(list, statistics(preset, data["channels"]))
    return [f"normalisation {preset} instead of the data set's: {verdict.evidence}"]


def doubted(verdict: Verdict, data: Mapping[str, Any]) -> str:
    """Warning if the network was trained with a normalisation other than the config's, or empty."""
    given = data["normalization"]
    if verdict.preset is None or apart(given, verdict.preset, data["channels"]) < MATERIAL:
        return ""
    return (
        f"WARNING: data.normalization={given}, but the network seems to know {verdict.preset}: "
        f"{verdict.evidence}"
    )


def chosen(verdict: Verdict, data: dict[str, Any], otherwise: str | None = None) -> str:
    """Fill in the inferred normalisation, or an assumption; returns a note."""
    data["order"] = data["order"] or verdict.order
    if verdict.preset is not None:
        data["normalization"] = verdict.preset
        order = f", channels in the order {verdict.order.upper()}" if verdict.order else ""
        return (
            f"data.normalization={verdict.preset}{order} as the network tells: {verdict.evidence}"
        )
    colour = "imagenet" if data["image_size"] >= 64 else "cifar10"
    name = otherwise or (colour if data["channels"] == 3 else "none")
    data["normalization"] = name
    return (
        f"data.normalization={name} is assumed, neither file nor network tells; if it is wrong, "
        "rates on data.test are too low for both networks and patches are shown in wrong units. "
        f"Known: {', '.join(NORMALIZATIONS)}, or {{mean: [...], std: [...]}}. Evidence: "
        f"{verdict.evidence}"
    )


def from_file(found: dict[str, list[float]], data: dict[str, Any]) -> list[str]:
    """Fill in the statistics of the file's own normalisation layer.

    Raises:
        ConfigError: ``data.normalization`` says something else.
    """
    given = data.get("normalization")
    if given is not None and apart(given, found, data["channels"]) > ROUNDED:
        raise got("data.normalization", given, f"null: the file has its own, {found}")
    if "mean" not in data:
        data["normalization"] = found
        return []
    own = {k: list(data[k]) for k in STATISTICS}
    data["mean"], data["std"] = map(list, statistics(found, data["channels"]))
    if apart(own, found, data["channels"]) <= ROUNDED:
        return []
    return [f"normalisation of the file's own first layer, {found}, instead of the data set's"]


def said(checkpoint: Checkpoint) -> str | dict[str, Any] | None:
    """Preset or statistics that the file names beside the weights."""
    facts = checkpoint.facts
    if {"mean", "std"} <= facts.keys() and isinstance(facts["mean"], (list, tuple)):
        return {k: list(facts[k]) for k in ("mean", "std")}
    for key in ("clean_data", "dataset"):
        if (name := str(facts.get(key, "")).lower()) in NORMALIZATIONS:
            return name
    return None


def inferred(*, classes: int, channels: int, image_size: int) -> nn.Module:
    """Placeholder in the config, replaced by ``completed`` with the inferred network.

    Raises:
        ConfigError: always: it was not replaced.
    """
    raise ConfigError(
        "model=inferred: only a file tells its network; set victim=checkpoint or victim=finetune, "
        "or choose a model="
    )
