"""Match names and shapes to a network: key layouts of other projects, and ours.

A layout renames the file's keys to those of one of our networks; a network fits when all its names
and shapes are there and nothing is left over. Positions never count.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from dhbe.checkpoint.families import Node, Shape, proposals
from dhbe.checkpoint.pickles import shown
from dhbe.config.schema import build

Renaming = Callable[[Iterable[str]], dict[str, str]]

HEAD = re.compile(
    r"(fc|linear|head|heads\.head|head\.fc|classifier|last_linear|output|out)(\.\d+)?\.weight"
)
STEM = re.compile(
    r"(conv1|stem\.0|features\.0(\.0)?|features\.conv0|conv_stem|conv_proj|patch_embed\.proj|0"
    r"|resnet\.embedder\.embedder\.convolution)\.weight"
)
COUNTER = "num_batches_tracked"
"""BatchNorm's counter: files of before torch 0.4.1 have none, and no network needs it."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A candidate network, and the file's keys renamed to its own."""

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


def after(first: Renaming, second: Renaming) -> Renaming:
    """Compose two renamings."""

    def apply(keys: Iterable[str]) -> dict[str, str]:
        found = first(keys)
        again = second(found.values())
        return {old: again[new] for old, new in found.items()}

    return apply


SHORTCUT = (r"\.shortcut\.", ".downsample.")
LINEAR = (r"^(linear|classifier|head|last_linear|output|out)\.", "fc.")
PLAIN: dict[str, Renaming] = {
    "as it is": renaming(),
    # kuangliu's pytorch-cifar, BackdoorBox, and much of the field's own code
    "shortcut, linear": renaming(SHORTCUT, LINEAR),
    "CIFAR ResNet": renaming(
        SHORTCUT,
        (r"^conv1\.", "stem.0."),
        (r"^bn1\.", "stem.1."),
        (r"^layer(\d)\.", lambda m: f"stages.{int(m[1]) - 1}."),  # type: ignore[arg-type]
        (r"^(linear|fc|classifier|last_linear|output|out)\.", "head."),
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
    "HuggingFace ResNet": renaming(
        (r"^(resnet\.)?embedder\.embedder\.convolution\.", "conv1."),
        (r"^(resnet\.)?embedder\.embedder\.normalization\.", "bn1."),
        (r"^(resnet\.)?encoder\.stages\.(\d)\.layers\.", lambda m: f"layer{int(m[2]) + 1}."),  # type: ignore[arg-type]
        (r"\.shortcut\.convolution\.", ".downsample.0."),
        (r"\.shortcut\.normalization\.", ".downsample.1."),
        (r"\.layer\.(\d)\.convolution\.", lambda m: f".conv{int(m[1]) + 1}."),  # type: ignore[arg-type]
        (r"\.layer\.(\d)\.normalization\.", lambda m: f".bn{int(m[1]) + 1}."),  # type: ignore[arg-type]
        (r"^classifier\.", "fc."),
    ),
}
HEADS = renaming((r"^((?:.*\.)?(?:fc|linear|head|classifier|last_linear))\.\d+\.", r"\1."))
"""``fc = Sequential(Dropout, Linear)``: in evaluation the linear layer alone."""
RENAMINGS = PLAIN | {
    f"{name}, dropout in the head": after(HEADS, rename) for name, rename in PLAIN.items()
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
    """Image size from a transformer's position embedding; None if there is none."""
    for table, patch in (
        ("pos_embed", "patch_embed.proj.weight"),
        ("encoder.pos_embedding", "conv_proj.weight"),
    ):
        if table in shapes and patch in shapes and len(shapes[table]) == 3:
            return int((shapes[table][1] - 1) ** 0.5 + 0.5) * shapes[patch][-1]
    return None


def built(node: Node, *, classes: int, channels: int, image_size: int) -> dict[str, Shape]:
    """Names and shapes of a network."""
    sizes = {"classes": classes, "channels": channels, "image_size": image_size}
    return _built(json.dumps([node, sizes]))


@functools.lru_cache(maxsize=512)
def _built(described: str) -> dict[str, Shape]:
    """Built on the meta device, once: the same few networks are candidates for every file."""
    node, sizes = json.loads(described)
    with torch.device("meta"):
        network = build(node, **sizes)
    return {k: tuple(v.shape) for k, v in network.state_dict().items()}


def differences(own: Mapping[str, Shape], given: Mapping[str, Shape]) -> list[str]:
    """Differences between weights and a network, as text; empty if they fit."""
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


class Nearest(NamedTuple):
    """The closest network, and its differences."""

    label: str
    wrong: list[str]


def candidates(
    shapes: Mapping[str, Shape],
    *,
    classes: int,
    channels: int,
    image_size: int,
    hint: str | None = None,
) -> tuple[list[Candidate], Nearest | None]:
    """All networks that fit, and the nearest one if none does (None: no name is known).

    Args:
        hint: a name that the file itself gives.
    """
    found: list[Candidate] = []
    nearest: Nearest | None = None
    sizes = {"classes": classes, "channels": channels, "image_size": image_size}
    for keys, given in renamed(shapes):
        native = all(old == new for old, new in keys.items())
        for label, proposed in proposals(given, hint, native):
            try:
                wrong = differences(built(proposed, **sizes), given)
            except Exception as error:  # a library's own refusal of these sizes
                wrong = [f"{label}: {error}"[:200]] * len(given)
            if not wrong and hint and label.endswith(f"model.name={hint}"):
                return [Candidate(label=label, node=proposed, keys=keys)], None
            if not wrong and all(proposed != c.node for c in found):
                found.append(Candidate(label=label, node=proposed, keys=keys))
            elif wrong and (nearest is None or len(wrong) < len(nearest.wrong)):
                nearest = Nearest(label, wrong)
        if found:
            break
    return found, nearest
