"""Which network the weights of a file belong to, and which images it takes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dhbe.checkpoint.layouts import (
    Candidate,
    Nearest,
    candidates,
    channels_in,
    classes_in,
    image_size_in,
)
from dhbe.checkpoint.loading import Checkpoint, fill, several
from dhbe.checkpoint.parametrized import folded_shapes
from dhbe.checkpoint.pickles import shown
from dhbe.checkpoint.preprocessing import (
    MARGIN,
    MOST_DIVERGENT,
    strangeness,
    told,
)
from dhbe.config import schema as config
from dhbe.core.errors import ArtefactError, ConfigError
from dhbe.models.own import REMEDY, channels_of, classes_of, digest_of, side_of

OWN = "dhbe.models.own.own"
"""``_target_`` of a user's own network."""
INFER = "dhbe.checkpoint.inferred"
"""``_target_`` of the model group that asks for inference."""
STRIDE = "stem_stride"
"""What shapes cannot tell; files of this project say it in their metadata."""
MAX_SAID = 4096
MODEL_FACTS = ("model_name", "arch", "architecture", "model")


def recognised(
    checkpoint: Checkpoint, model: dict[str, Any], data: dict[str, Any]
) -> tuple[dict[str, Any], str, list[str]]:
    """The network's config node, its name if it was found here, and notes; completes ``data``.

    Raises:
        ArtefactError: no known network fits.
        ConfigError: several do, or the classes are not known.
    """
    notes: list[str] = []
    facts, shapes = checkpoint.facts, folded_shapes(checkpoint.shapes)
    if "normalization" in data:
        data["classes"] = data["classes"] or classes_in(shapes) or whole(facts.get("num_classes"))
        data["channels"] = data["channels"] or channels_in(shapes)
    if model.get("_target_") == OWN:
        return *completed_by(model, checkpoint, data, notes), notes
    if "normalization" in data:
        data["channels"] = data["channels"] or 3
        data["image_size"] = data["image_size"] or image_size(checkpoint, notes)
    if model.get("_target_") == INFER:
        if not data["classes"]:
            raise unknown(checkpoint, None)
        return *infer(checkpoint, data), notes
    if not data["classes"]:
        raise ConfigError("data.classes=null: the file does not tell; set data.classes=")
    return model, "", notes


def completed_by(
    model: dict[str, Any], checkpoint: Checkpoint, data: dict[str, Any], notes: list[str]
) -> tuple[dict[str, Any], str]:
    """``model=own``: what the user's network answers of its images.

    Raises:
        ConfigError: it does not tell its classes either.
    """
    digest = digest_of(model["factory"])
    notes.append(
        f"the network is your own code, model.factory={model['factory']}"
        + (f" (SHA-256 {digest[:16]}...)" if digest else "")
    )
    network = config.build(model, **sizes(data))
    data["channels"] = data["channels"] or channels_of(network) or 3
    if not data["image_size"]:
        taken = side_of(network, data["channels"])
        data["image_size"] = taken or image_size(checkpoint, notes)
    if not data["classes"]:
        data["classes"] = classes_of(network, data["channels"], data["image_size"])
    if not data["classes"]:
        raise ConfigError("data.classes=null: neither file nor network tells; set data.classes=")
    return model | {"sha256": digest}, "own"


def infer(checkpoint: Checkpoint, data: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Config node and name of the one known network that fits.

    Raises:
        ArtefactError: none fits.
        ConfigError: several do, and the statistics of their BatchNorms do not tell them apart.
    """
    hint = next((str(checkpoint.facts[k]) for k in MODEL_FACTS if k in checkpoint.facts), None)
    shapes = folded_shapes(checkpoint.shapes)
    found, nearest = candidates(shapes, hint=hint, **{k: int(v) for k, v in sizes(data).items()})
    if STRIDE in checkpoint.facts:
        stride = str(checkpoint.facts[STRIDE])
        found = [c for c in found if str(c.node.get(STRIDE, stride)) == stride]
    if not found:
        raise unknown(checkpoint, nearest)
    best = found[0] if len(found) == 1 else likeliest(checkpoint, found, data)
    return best.node, best.label.split()[0]


def likeliest(checkpoint: Checkpoint, found: list[Candidate], data: Mapping[str, Any]) -> Candidate:
    """The candidate whose BatchNorm statistics match its activations best.

    Raises:
        ConfigError: none, or several.
    """
    images = {k: data[k] for k in ("channels", "image_size")}
    ranked = []
    for place, candidate in enumerate(found):
        network = config.build(candidate.node, **sizes(data))
        fill(network, checkpoint)
        verdict = told(network, **sizes(data))
        ranked.append((strangeness(network, verdict, **images), place))
    (best, place), (second, _) = sorted(ranked)[:2]
    if best <= MOST_DIVERGENT and second > MARGIN * best:
        return found[place]
    options = "; ".join(f"model={c.label}" for c in found)
    raise ConfigError(f"model=inferred: several networks fit {checkpoint.path}; say {options}")


def unknown(checkpoint: Checkpoint, nearest: Nearest | None) -> ArtefactError:
    """The refusal of weights that belong to no known network."""
    shapes = folded_shapes(checkpoint.shapes)
    if nearest is not None and len(nearest.wrong) <= len(shapes) / 2:
        said = f"no known network fits; the nearest, {nearest.label}, differs: "
        said += several(nearest.wrong)
    else:
        names = [f"{shown(k)} {v}" for k, v in shapes.items()]
        said = f"no known network has its {len(names)} weights: {several(names)}"
    return ArtefactError(
        f"victim.path={checkpoint.path}: {said}. model=timm model.name=..., model=torchvision "
        f"model.name=... and the configs of conf/model name others; {REMEDY}"
    )


def whole(said: object) -> int | None:
    """A number that a file gives, as such or as text, if it is one that can be meant."""
    if isinstance(said, str) and re.fullmatch(r"\d{1,4}", said, re.ASCII):
        said = int(said)
    return said if type(said) is int and 2 <= said <= MAX_SAID else None


def image_size(checkpoint: Checkpoint, notes: list[str]) -> int:
    """Side in pixels, from the file or, failing that, from the size of the first convolution."""
    names = ("img_size", "image_size", "input_size")
    said = next((checkpoint.facts[n] for n in names if n in checkpoint.facts), None)
    sizes = [whole(n) for n in (said if isinstance(said, (list, tuple)) else [said])]
    found = image_size_in(checkpoint.shapes) or max((n for n in sizes if n), default=None)
    if found:
        return found
    stem = checkpoint.shapes.get("conv1.weight", (0, 0, 3, 3))
    size = {5: 64, 7: 224}.get(stem[-1], 32)
    notes.append(
        f"data.image_size={size} is assumed from the first convolution; if it is wrong, the "
        "defense works at the wrong scale"
    )
    return size


def sizes(data: Mapping[str, Any]) -> dict[str, Any]:
    """Classes, channels and image size; None where unknown."""
    return {k: data[k] for k in ("classes", "channels", "image_size")}
