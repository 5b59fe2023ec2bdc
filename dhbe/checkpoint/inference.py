"""What a config leaves open and a file answers: network, classes, image size, normalisation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dhbe.checkpoint.layouts import candidates, channels_in, classes_in, image_size_in
from dhbe.checkpoint.loading import Checkpoint, digest, misfit
from dhbe.checkpoint.pickles import shown
from dhbe.core.errors import ArtefactError, ConfigError, got
from dhbe.data.own import NORMALIZATIONS

TARGET = "dhbe.checkpoint.CheckpointFile"
BUDGET = {"_target_": "dhbe.data.Budget"}
PICTURE = "attacks.picture.Picture"
INFER = "dhbe.checkpoint.inferred"
"""``_target_`` of the model group that asks for inference."""
STRIDE = "stem_stride"
"""What shapes cannot tell; files of this project say it in their metadata."""
MAX_SAID = 4096
MODEL_FACTS = ("model_name", "arch", "architecture", "model")


def completed(
    tree: dict[str, Any], choices: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The config with everything filled in that the checkpoint answers.

    Other configs come back as they are. What neither config nor file says is assumed, and listed
    in ``victim.assumed``.

    Returns:
        config, and the names of the chosen configs.

    Raises:
        ArtefactError: the file is refused, or no known network fits it.
        ConfigError: several networks fit, or none of file and config tells the classes.
    """
    node = tree.get("victim")
    choices = dict(choices)
    if not isinstance(node, dict) or node.get("_target_") != TARGET or node["path"] == "???":
        return tree, choices
    checkpoint = Checkpoint(Path(node["path"]))
    assumed: list[str] = []
    data = dict(tree["data"])
    own = "normalization" in data
    facts, shapes = checkpoint.facts, checkpoint.shapes
    if own:
        data["classes"] = data["classes"] or classes_in(shapes) or whole(facts.get("num_classes"))
        data["channels"] = data["channels"] or channels_in(shapes) or 3
    model = tree["model"]
    if not data["classes"]:
        raise ConfigError("data.classes=null: the file does not tell; set data.classes=")
    if own and not data["image_size"]:
        data["image_size"] = image_size(checkpoint, assumed)
    if isinstance(model, dict) and model.get("_target_") == INFER:
        model, choices["model"] = infer(checkpoint, data)
    if own and data["normalization"] is None:
        data["normalization"] = normalization(checkpoint, data, assumed)
    if own:  # a folder of clean images is the budget, whatever share a paper asks for
        clean = data["clean"] is not None
        choices["budget"] = "own" if clean else "none"
        name = "own" if clean else "none (data.clean is not set)"
        tree = tree | {"budget": BUDGET | {"name": name, "fraction": float(clean)}}
    tree, choices = suspected(tree, choices)
    if checkpoint.others:
        listed = ", ".join(map(shown, sorted(checkpoint.others)[:8]))
        assumed.append(f"{len(checkpoint.others)} tensors outside the network stay as is: {listed}")
    victim = node | {"sha256": digest(checkpoint.path), "assumed": assumed}
    return tree | {"victim": victim, "data": data, "model": model}, choices


def suspected(
    tree: dict[str, Any], choices: dict[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """``trigger=FILE`` stands for ``attack=picture attack.path=FILE``.

    Raises:
        ConfigError: another attack is chosen as well, or there are no images to try it on.
    """
    if tree.get("trigger") is None:
        return tree, choices
    if choices.get("attack", "none") != "none":
        raise got("trigger", tree["trigger"], f"alone, not with attack={choices['attack']}")
    if "test" in tree["data"] and tree["data"]["test"] is None:
        raise got("data.test", None, f"labelled images to try trigger={tree['trigger']} on")
    details = {"path": str(tree["trigger"]), "opacity": 1.0, "row": None, "column": None}
    attack = tree["attack"] | {"_target_": PICTURE} | details
    return tree | {"attack": attack}, choices | {"attack": "picture"}


def inferred(*, classes: int, channels: int, image_size: int) -> nn.Module:
    """Stands in the config until ``completed`` has put the network found in its place.

    Raises:
        ConfigError: always; nobody replaced it.
    """
    raise ConfigError("model=inferred: only a checkpoint tells its network; set victim=checkpoint")


def infer(checkpoint: Checkpoint, data: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Config node and name of the one known network that fits.

    Raises:
        ArtefactError: none fits.
        ConfigError: several do.
    """
    hint = next((str(checkpoint.facts[k]) for k in MODEL_FACTS if k in checkpoint.facts), None)
    sizes = {k: int(data[k]) for k in ("classes", "channels", "image_size")}
    found, wrong = candidates(checkpoint.shapes, hint=hint, **sizes)
    if STRIDE in checkpoint.facts:
        said = str(checkpoint.facts[STRIDE])
        found = [c for c in found if str(c.node.get(STRIDE, said)) == said]
    if not found:
        raise ArtefactError(
            misfit(checkpoint.path, wrong or ["no known name"], len(checkpoint.places))
            + " (model=timm model.name=..., model=torchvision model.name=..., or one of conf/model)"
        )
    if len(found) > 1:
        options = "; ".join(f"model={c.label}" for c in found)
        raise ConfigError(f"model=inferred: several networks fit {checkpoint.path}; say {options}")
    return found[0].node, found[0].label.split()[0]


def whole(said: object) -> int | None:
    """A number that a file gives, as such or as text, if it is one that can be meant."""
    if isinstance(said, str) and re.fullmatch(r"\d{1,4}", said, re.ASCII):
        said = int(said)
    return said if type(said) is int and 2 <= said <= MAX_SAID else None


def image_size(checkpoint: Checkpoint, assumed: list[str]) -> int:
    """Side in pixels, from the file or, failing that, from the size of the first convolution."""
    names = ("img_size", "image_size", "input_size")
    said = next((checkpoint.facts[n] for n in names if n in checkpoint.facts), None)
    sizes = [whole(n) for n in (said if isinstance(said, (list, tuple)) else [said])]
    found = image_size_in(checkpoint.shapes) or max((n for n in sizes if n), default=None)
    if found:
        return found
    stem = checkpoint.shapes.get("conv1.weight", (0, 0, 3, 3))
    size = {5: 64, 7: 224}.get(stem[-1], 32)
    assumed.append(
        f"data.image_size={size} is assumed from the first convolution; if it is wrong, the "
        "defense works at the wrong scale"
    )
    return size


def normalization(
    checkpoint: Checkpoint, data: Mapping[str, Any], assumed: list[str]
) -> str | dict[str, Any]:
    """Preset or statistics that the file names; else an assumption, with what follows from it."""
    facts = checkpoint.facts
    if found := checkpoint.normalization():
        return found
    if {"mean", "std"} <= facts.keys() and isinstance(facts["mean"], (list, tuple)):
        return {k: list(facts[k]) for k in ("mean", "std")}
    for key in ("clean_data", "dataset"):
        if (name := str(facts.get(key, "")).lower()) in NORMALIZATIONS:
            return name
    colour = "imagenet" if data["image_size"] >= 64 else "cifar10"
    name = colour if data["channels"] == 3 else "half"
    assumed.append(
        f"data.normalization={name} is assumed, the file does not say; if it is wrong, rates on "
        "data.test are too low for both networks and patches are shown in wrong units. "
        f"Known: {', '.join(NORMALIZATIONS)}, or {{mean: [...], std: [...]}}"
    )
    return name
