"""Which network a set of names and shapes belongs to: other people's layouts, and ours.

A layout renames the file's keys to those of one of our networks; a network fits when all its names
and shapes are there and nothing is left over. Positions never count.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torchvision

from dhbe.checkpoint.pickles import shown
from dhbe.config.schema import build

Shape = tuple[int, ...]
Node = dict[str, Any]
"""A config node of the ``model`` group."""
Renaming = Callable[[Iterable[str]], dict[str, str]]

HEAD = re.compile(r"(fc|linear|head|heads\.head|head\.fc|classifier|last_linear)(\.\d+)?\.weight")
STEM = re.compile(
    r"(conv1|stem\.0|features\.0(\.0)?|features\.conv0|conv_stem|conv_proj|patch_embed\.proj|0)"
    r"\.weight"
)
STEMS = {3: "cifar", 5: "dhbe64", 7: "imagenet"}
"""Side of a ResNet's first convolution -> our name of the stem."""
MOST_BLOCKS, MOST_WIDTH = 50, 8192
"""Of networks that are built to be compared: a hostile file may claim any number."""
COUNTER = "num_batches_tracked"
"""BatchNorm's counter: files of before torch 0.4.1 have none, and no network needs it."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A network that may be meant, and how the file's keys are called in it."""

    label: str
    node: Node
    keys: dict[str, str]
    """Key of the file -> key of the network."""


def renaming(*rules: tuple[str, str]) -> Renaming:
    """Replace patterns in every key."""
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]

    def apply(keys: Iterable[str]) -> dict[str, str]:
        found = {}
        for key in keys:
            new = key
            for pattern, replacement in compiled:
                new = pattern.sub(replacement, new)
            found[key] = new
        return found

    return apply


def numbered(pattern: str, *rules: tuple[str, str]) -> Renaming:
    """Count blocks through all stages: (stage, index) in a key -> ``blocks.N``; then the rules."""

    def apply(keys: Iterable[str]) -> dict[str, str]:
        keys = list(keys)
        places = {k: m for k in keys if (m := re.match(pattern, k))}
        stages = sorted({(int(m[1]), int(m[2])) for m in places.values()})
        order = {stage: i for i, stage in enumerate(stages)}
        found = {}
        for key, new in renaming(*rules)(keys).items():
            if key in places:
                m = places[key]
                new = f"blocks.{order[int(m[1]), int(m[2])]}" + new[m.end() - 1 :]
            found[key] = new
        return found

    return apply


SHORTCUT = (r"\.shortcut\.", ".downsample.")
RENAMINGS: dict[str, Renaming] = {
    "as it is": renaming(),
    # kuangliu's pytorch-cifar, BackdoorBox, and much of the field's own code
    "shortcut, linear": renaming(SHORTCUT, (r"^linear\.", "fc.")),
    "CIFAR ResNet": renaming(
        SHORTCUT,
        (r"^conv1\.", "stem.0."),
        (r"^bn1\.", "stem.1."),
        (r"^layer(\d)\.", lambda m: f"stages.{int(m[1]) - 1}."),  # type: ignore[arg-type]
        (r"^(linear|fc)\.", "head."),
    ),
    # BackdoorBench and WaNet: one convolution in a Sequential as shortcut
    "PreAct of BackdoorBench": numbered(
        r"layer(\d{1,3})\.(\d{1,3})\.", (r"\.shortcut\.0\.", ".shortcut."), (r"^linear\.", "head.")
    ),
    # xternalz/WideResNet-pytorch, NAD, ANP
    "Wide ResNet": numbered(
        r"block(\d{1,3})\.layer\.(\d{1,3})\.",
        (r"\.convShortcut\.", ".shortcut."),
        (r"^bn1\.", "bn."),
        (r"^fc\.", "head."),
    ),
}

OURS = {
    "resnet": "dhbe.models.resnet.resnet",
    "small": "dhbe.models.resnet.SmallResNet",
    "preact": "dhbe.models.preact.PreActResNet18",
    "wrn": "dhbe.models.preact.WideResNet",
    "vgg": "dhbe.models.other.vgg19_bn",
    "timm": "dhbe.models.other.from_timm",
    "torchvision": "dhbe.models.other.from_torchvision",
}
FAMILIES = {
    # a key that tells the family -> (library, names to try)
    r"layer1\.0\.(conv3|bn3)\.weight": (
        "torchvision",
        "resnet101 resnet152 resnext50_32x4d resnext101_32x8d wide_resnet50_2 wide_resnet101_2",
    ),
    r"features\.0\.weight": (
        "torchvision",
        "vgg11 vgg13 vgg16 vgg19 vgg11_bn vgg13_bn vgg16_bn vgg19_bn alexnet squeezenet1_1",
    ),
    r"features\.denseblock1\.denselayer1\.norm1\.weight": (
        "torchvision",
        "densenet121 densenet169 densenet201 densenet161",
    ),
    r"features\.1\.conv\.0\.0\.weight": ("torchvision", "mobilenet_v2"),
    r"features\.1\.block\.0\.0\.weight": ("torchvision", "mobilenet_v3_small mobilenet_v3_large"),
    r"features\.1\.0\.block\.0\.0\.weight": (
        "torchvision",
        "efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4 "
        "efficientnet_v2_s",
    ),
    r"features\.1\.0\.block\.0\.weight": (
        "torchvision",
        "convnext_tiny convnext_small convnext_base",
    ),
    r"encoder\.layers\.encoder_layer_0\.ln_1\.weight": (
        "torchvision",
        "vit_b_16 vit_b_32 vit_l_16",
    ),
    r"conv_stem\.weight": (
        "timm",
        "mobilenetv3_small_100 mobilenetv3_large_100 efficientnet_b0 efficientnet_b1 "
        "efficientnet_b2 efficientnet_b3 mobilenetv2_100 mnasnet_100 tf_mobilenetv3_small_100 "
        "tf_mobilenetv3_large_100 tf_efficientnet_b0 tf_efficientnet_b1 tf_efficientnet_b2 "
        "tf_efficientnet_b3",
    ),
    r"stages\.0\.blocks\.0\.conv_dw\.weight": (
        "timm",
        "convnext_atto convnext_femto convnext_pico convnext_nano convnext_tiny convnext_small",
    ),
    r"blocks\.0\.attn\.qkv\.weight": (
        "timm",
        "vit_tiny_patch16_224 vit_small_patch16_224 vit_base_patch16_224",
    ),
}


def classes_in(shapes: Mapping[str, Shape]) -> int | None:
    """Outputs of the classifier; None if no key looks like one."""
    heads = sorted(k for k, s in shapes.items() if HEAD.fullmatch(k) and len(s) in (2, 4))
    return shapes[heads[-1]][0] if heads else None


def channels_in(shapes: Mapping[str, Shape]) -> int | None:
    """Channels of the images; None if no key looks like a first convolution."""
    stems = [k for k, s in shapes.items() if STEM.fullmatch(k) and len(s) == 4]
    return shapes[stems[0]][1] if stems else None


def image_size_in(shapes: Mapping[str, Shape]) -> int | None:
    """Side of the images, where a transformer's position table tells it."""
    for table, patch in (
        ("pos_embed", "patch_embed.proj.weight"),
        ("encoder.pos_embedding", "conv_proj.weight"),
    ):
        if table in shapes and patch in shapes and len(shapes[table]) == 3:
            return int((shapes[table][1] - 1) ** 0.5 + 0.5) * shapes[patch][-1]
    return None


def built(node: Node, *, classes: int, channels: int, image_size: int) -> dict[str, Shape]:
    """Names and shapes of a network, without its memory."""
    with torch.device("meta"):
        network = build(node, classes=classes, channels=channels, image_size=image_size)
    return {k: tuple(v.shape) for k, v in network.state_dict().items()}


def differences(own: Mapping[str, Shape], given: Mapping[str, Shape]) -> list[str]:
    """What keeps weights from fitting a network, in words; empty if they fit."""
    found = [f"missing {shown(k)}" for k in own.keys() - given.keys() if not k.endswith(COUNTER)]
    found += [f"unknown {shown(k)}" for k in given.keys() - own.keys()]
    found += [
        f"{k} is {given[k]}, expected {own[k]}"
        for k in own.keys() & given.keys()
        if own[k] != given[k]
    ]
    return sorted(found)


def renamed(shapes: Mapping[str, Shape]) -> Iterator[tuple[dict[str, str], dict[str, Shape]]]:
    """Every layout's reading of the keys, without repetitions."""
    seen: list[dict[str, str]] = []
    for rename in RENAMINGS.values():
        keys = rename(shapes)
        if keys not in seen and len(set(keys.values())) == len(keys):
            seen.append(keys)
            yield keys, {new: shapes[old] for old, new in keys.items()}


def proposals(
    shapes: Mapping[str, Shape], hint: str | None, native: bool
) -> Iterator[tuple[str, Node]]:
    """Networks worth comparing with these (renamed) shapes: the file's own word first.

    Args:
        native: the keys were not renamed, so they are those of this project.
    """
    if hint:
        for library, known in (("timm", timm.is_model), ("torchvision", _in_torchvision)):
            if known(hint):
                yield f"{library} model.name={hint}", _library(library, hint, shapes)
    for family in (_resnets, _preacts):
        yield from family(shapes)
    if "stages.0.0.conv1.weight" in shapes and "stem.0.weight" in shapes:
        yield from _small_resnets(shapes, native)
    if "features.0.weight" in shapes and "classifier.weight" in shapes:
        yield "vgg19_bn", {"_target_": OURS["vgg"]}
    for key, (library, names) in FAMILIES.items():
        if any(map(re.compile(key).fullmatch, shapes)):
            for name in names.split():
                yield f"{library} model.name={name}", _library(library, name, shapes)


def _count(shapes: Mapping[str, Shape], pattern: str) -> int:
    return sum(re.fullmatch(pattern, k) is not None for k in shapes)


def _resnets(shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Node]]:
    stem = shapes.get("conv1.weight", (0,))[-1]
    if "layer1.0.conv1.weight" in shapes and stem in STEMS:
        for depth in (18, 34, 50):
            node = {"_target_": OURS["resnet"], "depth": depth, "stem": STEMS[stem]}
            yield f"resnet{depth} model.stem={STEMS[stem]}", node


def _preacts(shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Node]]:
    if "blocks.0.bn1.weight" not in shapes:
        return
    yield "preact_resnet18", {"_target_": OURS["preact"]}
    depth, rest = divmod(_count(shapes, r"blocks\.\d+\.conv1\.weight"), 3)
    widen = shapes.get("blocks.0.conv1.weight", (0,))[0] // 16
    if 0 < depth <= MOST_BLOCKS and not rest and widen:
        node = {"_target_": OURS["wrn"], "depth": 6 * depth + 4, "widen": widen}
        yield f"wrn_16_1 model.depth={node['depth']} model.widen={widen}", node


def _small_resnets(shapes: Mapping[str, Shape], native: bool) -> Iterator[tuple[str, Node]]:
    stages = _count(shapes, r"stages\.\d+\.0\.conv1\.weight")
    blocks = _count(shapes, r"stages\.0\.\d+\.conv1\.weight")
    widths = [shapes.get(f"stages.{i}.0.conv1.weight", (0,))[0] for i in range(stages)]
    if not all(0 < w <= MOST_WIDTH for w in widths) or stages > 8 or blocks > MOST_BLOCKS:
        return
    label = f"resnet_small model.widths=[{','.join(map(str, widths))}] model.blocks={blocks}"
    for stride in (1, 2) if native else (1,):  # others' CIFAR ResNets have stride 1
        sizes = {"widths": widths, "blocks": blocks, "stem_stride": stride}
        yield f"{label} model.stem_stride={stride}", {"_target_": OURS["small"], **sizes}


def _in_torchvision(name: str) -> bool:
    return name in torchvision.models.list_models(module=torchvision.models)


def _library(library: str, name: str, shapes: Mapping[str, Shape]) -> Node:
    options = {}
    if library == "timm" and "patch_embed.proj.weight" in shapes:
        options = {"patch_size": shapes["patch_embed.proj.weight"][-1]}
    return {"_target_": OURS[library], "name": name, "options": options}


def candidates(
    shapes: Mapping[str, Shape],
    *,
    classes: int,
    channels: int,
    image_size: int,
    hint: str | None = None,
) -> tuple[list[Candidate], list[str]]:
    """All networks that fit, and what is wrong with the nearest one if none does.

    Args:
        hint: a name that the file itself gives.
    """
    found: list[Candidate] = []
    nearest: list[str] = []
    sizes = {"classes": classes, "channels": channels, "image_size": image_size}
    for keys, given in renamed(shapes):
        native = all(old == new for old, new in keys.items())
        for label, proposed in proposals(given, hint, native):
            try:
                wrong = differences(built(proposed, **sizes), given)
            except Exception as error:  # a library's own refusal of these sizes
                wrong = [f"{label}: {error}"[:200]]
            if not wrong and all(proposed != c.node for c in found):
                found.append(Candidate(label=label, node=proposed, keys=keys))
            elif wrong and (not nearest or len(wrong) < len(nearest)):
                nearest = wrong
        if found:
            break
    return found, nearest
