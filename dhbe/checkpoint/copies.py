"""Copies of the network in the same file (averaged weights, student and teacher)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from dhbe.checkpoint.pickles import Refused, shown
from dhbe.checkpoint.places import MAX_TENSORS, Place

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class Copy(NamedTuple):
    """Path of the copy, and its tensors by the network's own keys."""

    path: str
    places: dict[str, Place]


def copies(content: Any, chosen: Mapping[str, Place]) -> list[Copy]:
    """All complete copies of the chosen weights: the same names, perhaps behind others, and shapes.

    Raises:
        Refused: half a copy or more, which cannot be purified alike and would stay as it is.
    """
    own = set(chosen.values())
    found = []
    for path, node in nodes(content):
        for copy in _in(path, node, chosen, own):
            if len(copy.places) == len(chosen):
                found.append(copy)
            elif copy.places:
                raise Refused(
                    f"under '{copy.path}' lie {len(copy.places)} of the network's {len(chosen)} "
                    "weights once more, but not all: they cannot be purified alike and would "
                    "stay as they are. Save the network alone: torch.save(state_dict, 'weights.pt')"
                )
    return found


def nodes(content: Any) -> Iterator[tuple[str, Any]]:
    """Containers that hold tensors, each once."""
    todo, seen = [("", content)], set()
    while todo:
        path, node = todo.pop()
        if id(node) in seen or isinstance(node, Place):
            continue
        seen.add(id(node))
        entries = list(node.items()) if isinstance(node, dict) else list(enumerate(node))
        if any(isinstance(v, Place) for _, v in entries):
            yield path, node
        for key, value in entries:
            if isinstance(value, (dict, list, tuple)):
                name = shown(key, 40)
                todo.append((f"{path}.{name}"[-200:] if path else name, value))


def _in(path: str, node: Any, chosen: Mapping[str, Place], own: set[Place]) -> Iterator[Copy]:
    if isinstance(node, dict):
        tensors = {k: p for k, p in node.items() if type(k) is str and isinstance(p, Place)}
        if len(tensors) <= 8 * MAX_TENSORS:
            yield from _named(path, tensors, chosen, own)
        return
    listed = [p for p in node if isinstance(p, Place)]
    for skipped in ((), BUFFERS):  # averages of all, or of what an optimizer knows
        keys = [k for k in chosen if not k.endswith(skipped)] if skipped else list(chosen)
        fits = [p.shape for p in listed] == [chosen[k].shape for k in keys]
        if len(keys) > 1 and fits and not own & set(listed):
            yield Copy(path, {**chosen, **dict(zip(keys, listed, strict=True))})
            return


def _named(
    path: str, tensors: Mapping[str, Place], chosen: Mapping[str, Place], own: set[Place]
) -> Iterator[Copy]:
    """Tensors that end in the network's names, by what stands before."""
    groups: dict[str, dict[str, Place]] = defaultdict(dict)
    for key, place in tensors.items():
        if place in own:
            continue
        words = key.split(".", 12)
        for i in range(len(words)):
            name = ".".join(words[i:])
            if name in chosen and chosen[name].shape == place.shape:
                groups[key.removesuffix(name)][name] = place
    for prefix, found in groups.items():
        if 2 * len(found) >= len(chosen) > 1:
            yield Copy(f"{path}.{prefix}".strip("."), found)
