"""Candidate architectures for given names and shapes: ours, torchvision's, timm's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import timm
import torchvision

Shape = tuple[int, ...]
Node = dict[str, Any]
"""A config node of the ``model`` group."""

STEMS = {3: "cifar", 5: "dhbe64", 7: "imagenet"}
"""Side of a ResNet's first convolution -> our name of the stem."""
PUBLISHED = (20, 32, 44, 56, 110)
"""Depths of He et al.'s CIFAR ResNets, which have configs of their own."""
MOST_BLOCKS, MOST_WIDTH = 50, 8192
"""Of networks that are built to be compared: a hostile file may claim any number."""

OURS = {
    "resnet": "dhbe.models.resnet.resnet",
    "small": "dhbe.models.resnet.SmallResNet",
    "padded": "dhbe.models.resnet.CifarResNet",
    "preact": "dhbe.models.preact.PreActResNet18",
    "wrn": "dhbe.models.preact.WideResNet",
    "airbench": "dhbe.models.airbench.Airbench",
    "vgg": "dhbe.models.other.vgg_bn",
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


def proposals(
    shapes: Mapping[str, Shape], hint: str | None, native: bool
) -> Iterator[tuple[str, Node]]:
    """Candidates for these (renamed) shapes; the architecture that the file names comes first.

    Args:
        native: the keys were not renamed, so they are those of this project.
    """
    if hint:
        for library, known in (("timm", timm.is_model), ("torchvision", _in_torchvision)):
            if known(hint):
                yield f"{library} model.name={hint}", _library(library, hint, shapes)
    for family in (_resnets, _preacts, _vggs, _airbenches):
        yield from family(shapes)
    if "stages.0.0.conv1.weight" in shapes and "stem.0.weight" in shapes:
        yield from _small_resnets(shapes, native)
    for key, (library, names) in FAMILIES.items():
        if any(map(re.compile(key).fullmatch, shapes)):
            for name in names.split():
                yield f"{library} model.name={name}", _library(library, name, shapes)


def _count(shapes: Mapping[str, Shape], pattern: str) -> int:
    return sum(re.fullmatch(pattern, k) is not None for k in shapes)


def _resnets(shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Node]]:
    stem = (shapes.get("conv1.weight") or (0,))[-1]
    if "layer1.0.conv1.weight" in shapes and stem in STEMS:
        for depth in (18, 34, 50):
            node = {"_target_": OURS["resnet"], "depth": depth, "stem": STEMS[stem]}
            yield f"resnet{depth} model.stem={STEMS[stem]}", node


def _vggs(shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Node]]:
    if "features.0.weight" in shapes and "classifier.weight" in shapes:
        for depth in (11, 13, 16, 19):
            yield f"vgg_bn model.depth={depth}", {"_target_": OURS["vgg"], "depth": depth}


def _airbenches(shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Node]]:
    widths = [shapes.get(f"groups.{i}.0.weight", (0,))[0] for i in (1, 2, 3)]
    if "whiten.weight" in shapes and all(0 < w <= MOST_WIDTH for w in widths):
        node = {"_target_": OURS["airbench"], "widths": widths}
        yield f"airbench model.widths={_listed(widths)}", node


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
    if stages > 8:
        return
    counts = [_count(shapes, rf"stages\.{i}\.\d+\.conv1\.weight") for i in range(stages)]
    widths = [shapes.get(f"stages.{i}.0.conv1.weight", (0,))[0] for i in range(stages)]
    if not all(0 < w <= MOST_WIDTH for w in widths) or not all(
        0 < n <= MOST_BLOCKS for n in counts
    ):
        return
    blocks = counts[0] if len(set(counts)) == 1 else counts
    said = f"model.widths={_listed(widths)} model.blocks={_listed(blocks)}"
    if not any(".downsample." in k for k in shapes) and stages > 1:
        depth = 6 * counts[0] + 2
        plain = widths == [16, 32, 64] and depth in PUBLISHED and isinstance(blocks, int)
        sizes = {"widths": widths, "blocks": blocks}
        label = f"resnet{depth}" if plain else f"resnet20 {said}"
        yield label, {"_target_": OURS["padded"], **sizes}
    for stride in (1, 2) if native else (1,):  # others' CIFAR ResNets have stride 1
        sizes = {"widths": widths, "blocks": blocks, "stem_stride": stride}
        label = f"resnet_small {said} model.stem_stride={stride}"
        yield label, {"_target_": OURS["small"], **sizes}


def _listed(value: int | list[int]) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)


def _in_torchvision(name: str) -> bool:
    return name in torchvision.models.list_models(module=torchvision.models)


def _library(library: str, name: str, shapes: Mapping[str, Shape]) -> Node:
    options = {}
    if library == "timm" and "patch_embed.proj.weight" in shapes:
        options = {"patch_size": shapes["patch_embed.proj.weight"][-1]}
    return {"_target_": OURS[library], "name": name, "options": options}
