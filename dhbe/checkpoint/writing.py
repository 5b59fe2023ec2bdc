"""A purified file: the weights exchanged, everything else made again (``rebuilt.py``)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dhbe.checkpoint.files import Legacy, Safetensors
from dhbe.checkpoint.places import Place
from dhbe.checkpoint.rebuilt import Rebuilder, suffix_of, write_safetensors, write_torch
from dhbe.checkpoint.records import WeightFile
from dhbe.core.errors import ArtefactError

MAX_LISTED = 8
log = logging.getLogger(__name__)


class New(NamedTuple):
    """A weight: its name in the network and in the file, where it lies, its new numbers."""

    key: str
    original: str
    place: Place
    value: Tensor


def untold(tree: Mapping[str, Any]) -> dict[str, str]:
    """Metadata of this project's files: what the shapes of a config's network do not tell."""
    about = {"data": tree["data"]["name"], "image_size": str(tree["data"]["image_size"])}
    if "stem_stride" in tree["model"]:
        about["stem_stride"] = str(tree["model"]["stem_stride"])
    return about


def written(file: WeightFile, path: Path, folder: Path, weights: Sequence[New]) -> Path:
    """Write the new file; omitted content is logged.

    Raises:
        ArtefactError: a weight does not fit the file's number type, or its place is another's.
    """
    plain = file.program or isinstance(file, Safetensors)
    stem, suffix = suffix_of(path.name, plain)
    target = folder / f"{stem}-purified{suffix}"
    tensor = exchanged(file, path, weights)
    if file.program:
        write_safetensors({w.original: tensor(w.place).clone() for w in weights}, {}, target)
    elif plain:
        tensors = {k: tensor(p) for k, p in file.content.items()}
        write_safetensors(tensors, file.metadata, target)
    else:
        rebuilder = Rebuilder(partial(as_held, file, tensor))
        write_torch(rebuilder.value(file.content), target, legacy=isinstance(file, Legacy))
        tell(path, rebuilder.dropped)
    return target


def exchanged(file: WeightFile, path: Path, weights: Sequence[New]) -> Callable[[Place], Tensor]:
    """Place -> its tensor in the new file; tensors of one record share their memory."""
    held: dict[str, Tensor] = {}

    def tensor(place: Place) -> Tensor:
        if not place.nbytes:
            return torch.empty(place.shape, dtype=place.dtype)
        if place.record not in held:  # one object, so that torch.save writes it once
            held[place.record] = torch.frombuffer(file.read(place.record), dtype=place.dtype)
        return held[place.record].as_strided(place.shape, place.stride, place.offset)

    for new in weights:
        tensor(new.place).copy_(new.value)
    for new in weights:  # after all: some may share their memory
        view = tensor(new.place)
        if not torch.equal(view, new.value.to(view.dtype)):
            raise ArtefactError(
                f"victim.path={path}: {new.key} shares its place in the file with another "
                "weight that is no longer equal; the file cannot hold both"
            )
        if view.is_floating_point() and not view.isfinite().all():
            raise ArtefactError(
                f"victim.path={path}: the purified {new.key} does not fit {view.dtype}"
            )
    return tensor


def as_held(file: WeightFile, tensor: Callable[[Place], Tensor], place: Place) -> Any:
    """The tensor, of any shape, or a numpy array where the file had one."""
    value = tensor(place)
    return value.numpy() if place.record in file.arrays else value


def tell(path: Path, dropped: Mapping[str, str]) -> None:
    """Log the content that the purified file omits."""
    if dropped:
        some = [f"{k} ({v})" for k, v in list(dropped.items())[:MAX_LISTED]]
        more = ", ..." if len(dropped) > MAX_LISTED else ""
        log.warning(
            "%s: left out of the purified file, because only code could make them again: %s",
            path,
            ", ".join(some) + more,
        )
