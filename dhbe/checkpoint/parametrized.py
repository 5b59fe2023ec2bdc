"""Parametrised weights (weight normalisation, pruning): folded, and split again for writing.

The file of a weight-normalised convolution has ``weight_g`` and ``weight_v`` instead of ``weight``
(``parametrizations.weight.original0`` and ``original1`` since torch 2), that of a pruned one
``weight_orig`` and ``weight_mask``. A purified network has plain weights; written back, they become
parts that give these weights again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Parts(NamedTuple):
    """Names of the two parts of a parametrisation, and its kind."""

    first: str
    second: str
    kind: str


KINDS = (
    Parts("{}_g", "{}_v", "weight norm"),
    Parts("parametrizations.{}.original0", "parametrizations.{}.original1", "weight norm"),
    Parts("{}_mask", "{}_orig", "pruning"),
)
NAMES = ("weight", "bias")


def parts_in(keys: Iterable[str]) -> Iterator[tuple[str, str, str, str]]:
    """(key of the plain weight, its two parts' keys, kind) of all that is held in parts."""
    keys = set(keys)
    for key in sorted(keys):
        for names in KINDS:
            for name in NAMES:
                first = names.first.format(name)
                if key != first and not key.endswith(f".{first}"):
                    continue
                start = key[: len(key) - len(first)]
                second = start + names.second.format(name)
                if second in keys and start + name not in keys:
                    yield start + name, key, second, names.kind


def folded_shapes(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Names and shapes as if every weight were held as such; the order stays."""
    whole = {}
    for plain, first, second, _ in parts_in(shapes):
        whole[second] = (plain, first)
    firsts = {first for _, first in whole.values()}
    return {
        whole[k][0] if k in whole else k: shape for k, shape in shapes.items() if k not in firsts
    }


def folded(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fold all parametrised weights of a state dict; shapes are those of ``folded_shapes``."""
    found = dict(weights)
    for plain, first, second, kind in parts_in(weights):
        a, b = found.pop(first), found.pop(second)
        found[plain] = a * b if kind == "pruning" else b * (a / norms(b, a.shape))
    return found


def unfolded(plain: Mapping[str, Tensor], shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    """Parts that give these weights, under the names and with the shapes of a file.

    A weight is its own direction and its norms its lengths; a mask of pruning keeps whatever is
    not zero.
    """
    found = dict(plain)
    for key, first, second, kind in parts_in(shapes):
        weight = found.pop(key)
        found[second] = weight
        if kind == "pruning":
            found[first] = (weight != 0).to(weight.dtype)
        else:
            found[first] = norms(weight, shapes[first])
    return found


def norms(weight: Tensor, shape: Shape) -> Tensor:
    """Norms of a weight over all dimensions that ``shape`` has as 1."""
    norm = torch.linalg.vector_norm
    if weight.ndim != len(shape):
        whole: Tensor = norm(weight)
        return whole.reshape(shape)
    over = [i for i, (n, m) in enumerate(zip(weight.shape, shape, strict=True)) if n != m]
    lengths: Tensor = norm(weight, dim=over, keepdim=True) if over else weight.abs()
    return lengths
