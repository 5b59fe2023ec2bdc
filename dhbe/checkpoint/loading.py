"""The state dict inside a file, as used by ``victim=checkpoint``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from dhbe.checkpoint.copies import copies
from dhbe.checkpoint.families import Shape
from dhbe.checkpoint.files import DAMAGE
from dhbe.checkpoint.folders import bytes_of, opened
from dhbe.checkpoint.kinds import SAVE, module_in
from dhbe.checkpoint.layouts import RENAMINGS, differences
from dhbe.checkpoint.nesting import (
    MAX_LISTED,
    STATISTICS,
    Found,
    facts,
    is_statistic,
    listed,
    weights_in,
    wrapper,
)
from dhbe.checkpoint.parametrized import folded, folded_shapes, unfolded
from dhbe.checkpoint.pickles import Refused, shown
from dhbe.checkpoint.places import Place
from dhbe.checkpoint.writing import New, written
from dhbe.core.errors import ArtefactError, ConfigError
from dhbe.models import Normalized
from dhbe.models.own import REMEDY

UNWRITTEN = "unwritten"
"""Metadata of this project's files: what the network has that no weight says."""


class Checkpoint:
    """A file's state dict: names, shapes and places; tensors are read when asked for.

    Args:
        key: of the weights inside the file, where there are several (``Found.path``).

    Attributes:
        places: key as in the network (wrappers' prefixes removed) -> where the tensor lies.
        original: the same keys -> as the file has them.
        others: tensors of the same dict that belong to no network (``criterion.weight``).
        facts: what else the file says in plain words and numbers, such as ``num_classes``.

    Raises:
        ArtefactError: missing, damaged, too large, no state dict inside, or more than data.
    """

    def __init__(self, path: Path, key: str | None = None) -> None:
        self.path = path
        with self.refused():
            self.file = opened(path)
            self.key, found, prefix = self._found(key)
        self.prefix = prefix = wrapper(found, prefix)
        inside = [k for k, p in found.items() if k.startswith(prefix) and not is_statistic(k, p)]
        chosen = set(inside)
        self.places = {k.removeprefix(prefix): found[k] for k in inside}
        self.original = {k.removeprefix(prefix): k for k in inside}
        self.others = {k: p for k, p in found.items() if k not in chosen}
        said = {k: listed(v) for k, v in self.file.metadata.items()}
        self.facts = dict(facts(self.file.content)) | said
        with self.refused():
            if sum(p.reach for p in found.values()) > 2 * bytes_of(path):
                raise Refused("its tensors claim more than the file holds; not read")
            self.copies = [] if self.file.program else copies(self.file.content, self.places)
            self.file.verify()

    def _found(self, key: str | None) -> Found:
        """The weights in the file; whole networks that were pickled are named as such."""
        try:
            return weights_in(self.file, key)
        except Refused:
            if name := module_in(self.file.content):
                raise Refused(
                    f"a whole pickled network of class {name}, whose code would have to be run; "
                    f"{SAVE}"
                ) from None
            raise

    @contextmanager
    def refused(self) -> Iterator[None]:
        """Turn every exception that a malformed file can cause into an ``ArtefactError``."""
        try:
            yield
        except Refused as error:
            if not os.path.lexists(self.path):
                raise ArtefactError(f"victim.path={self.path}: no such file") from None
            raise self.refusal(error) from error
        except OSError as error:
            if not os.path.lexists(self.path):
                raise ArtefactError(f"victim.path={self.path}: no such file") from None
            raise ArtefactError(f"victim.path={self.path}: cannot be read ({error})") from error
        except DAMAGE as error:
            raise self.refusal(Refused(f"damaged ({shown(error, 200)})")) from error

    @property
    def notes(self) -> list[str]:
        """Notes on how the rest of the file is treated."""
        names = ", ".join(c.path or "(top)" for c in self.copies[:MAX_LISTED])
        return [f"copies of the network are replaced alike: {names}"] if self.copies else []

    def refusal(self, error: Refused) -> ArtefactError:
        """Error message with the file name, the cause and the consequence."""
        return ArtefactError(
            f"victim.path={self.path}: not a safetensors file or a plain state dict ({error}); "
            "nothing in it was executed"
        )

    @property
    def shapes(self) -> dict[str, Shape]:
        """Names and shapes of the weights."""
        return {k: p.shape for k, p in self.places.items()}

    def read(self, key: str) -> Tensor:
        """One tensor of ``places``.

        Raises:
            ArtefactError: it holds NaN or infinite values.
        """
        return self._read(self.original[key], self.places[key])

    def other(self, name: str) -> Tensor:
        """The tensor under a key of ``others``, in its own shape and type, on the CPU."""
        return self._read(name, self.others[name])

    def _read(self, name: str, place: Place) -> Tensor:
        with self.refused():
            value = self.file.tensor(place)
        if value.is_floating_point() and not value.isfinite().all():
            raise ArtefactError(
                f"victim.path={self.path}: {shown(name)} holds NaN or infinite values; no defense "
                "can start from it"
            )
        return value

    def normalization(self) -> dict[str, list[float]] | None:
        """``mean`` and ``std`` per channel that the file's own first layer uses, if it has one."""
        found = {}
        for key, place in self.others.items():
            if is_statistic(key, place):
                name = key.rpartition(".")[2].lstrip("_")
                found[name] = self.other(key).double().flatten().tolist()
        return {k: found[k] for k in STATISTICS} if len(found) == len(STATISTICS) else None

    def write(self, folder: Path, weights: Mapping[str, Tensor]) -> Path:
        """A new file in ``folder`` with these weights and what else the file held that is plain.

        It has the input's format, nesting and keys; copies of the network get the same weights. The
        name gets ``-purified`` added. Of programs (TorchScript, torch.export) and folders only the
        weights are written, as safetensors under their own keys: code is unread.

        Raises:
            ArtefactError: a weight does not fit the file's number type.
        """
        with self.refused():
            return written(self.file, self.path, folder, self._sets(weights))

    def _sets(self, weights: Mapping[str, Tensor]) -> list[New]:
        """Every weight with each of its places, and its name in the file."""
        return [
            New(k, self.original[k], places[k], value)
            for places in (self.places, *(c.places for c in self.copies))
            for k, value in weights.items()
        ]


class CheckpointFile:
    """A checkpoint file in place of a trained victim.

    Args:
        key: of the weights inside the file, where there are several.
        sha256: of the file; filled in when the run begins and checked when the weights are read.
        assumed: what the file does not say and was assumed, in words; filled in likewise.
    """

    def __init__(
        self,
        *,
        path: str,
        key: str | None = None,
        sha256: str = "",
        assumed: list[str] | None = None,
    ) -> None:
        self.path, self.key, self.sha256 = Path(path), key, sha256
        self.assumed = assumed or []

    def outside(self, folder: Path) -> None:
        """Refuse a result folder that holds the file: publishing a result replaces the folder.

        Raises:
            ConfigError: the file lies in ``folder``.
        """
        unfinished = folder.with_name(f".{folder.name}.partial")
        if {folder.resolve(), unfinished.resolve()} & set(self.path.resolve().parents):
            raise ConfigError(
                f"hydra.run.dir={folder}: {self.path} is inside the result folder, which would be "
                "replaced; choose another folder"
            )

    def load_into(self, network: Normalized) -> Checkpoint:
        """Fill ``network`` with the file's weights.

        A file of this project also holds the normalisation; others only the network behind it.

        Raises:
            ArtefactError: a weight is missing, left over or of another shape, the file has
                changed since the run began, or it says that its weights are not all.
        """
        checkpoint = self.unchanged()
        if said := checkpoint.file.metadata.get(UNWRITTEN):
            raise ArtefactError(
                f"victim.path={self.path}: its weights alone are not the network that was "
                f"measured ({shown(said, 200)}); take the weights of another run"
            )
        fill(network.network, checkpoint)
        if checkpoint.others.keys() == set(STATISTICS):  # a file of this project
            for name in STATISTICS:
                own_value = getattr(network, name)
                value = checkpoint.other(name)
                if value.shape != own_value.shape:
                    wrong = [f"{name} is {tuple(value.shape)}, expected {tuple(own_value.shape)}"]
                    raise ArtefactError(misfit(self.path, wrong))
                own_value.copy_(value)
        return checkpoint

    def unchanged(self) -> Checkpoint:
        """The file, opened.

        Raises:
            ArtefactError: it is not the one that the run began with.
        """
        checkpoint = Checkpoint(self.path, self.key)
        if self.sha256 and self.sha256 != checkpoint.file.digest():
            raise ArtefactError(f"victim.path={self.path}: changed during the run; start again")
        return checkpoint

    @torch.no_grad()
    def write_back(self, network: Normalized, folder: Path) -> Path:
        """The purified weights in the file's own format and key layout, under a new name.

        Raises:
            ArtefactError: the file has changed or vanished since the run began, or its number type
                cannot hold a weight.
        """
        checkpoint = self.unchanged()
        own = network.network.state_dict()
        keys = matched(checkpoint, network.network)
        plain = {k: own[new].cpu() for k, new in keys.items()}
        return checkpoint.write(folder, unfolded(plain, checkpoint.shapes))


@torch.no_grad()
def fill(network: nn.Module, checkpoint: Checkpoint) -> None:
    """Load the file's weights into the network, in place.

    Raises:
        ArtefactError: they do not fit, or are quantised.
    """
    keys = matched(checkpoint, network)
    own = network.state_dict()
    held = folded({k: checkpoint.read(k) for k in checkpoint.places})
    weights = {keys[k]: value for k, value in held.items()}
    for key, value in weights.items():
        if own[key].is_floating_point() and not value.is_floating_point():
            raise ArtefactError(
                f"victim.path={checkpoint.path}: {key} is made of {value.dtype}; a quantised file "
                "has no weights to purify"
            )
    network.load_state_dict(own | weights)


def matched(checkpoint: Checkpoint, network: nn.Module) -> dict[str, str]:
    """Key of the file, parametrisations folded -> key of the network, by the layout that fits.

    Raises:
        ArtefactError: none does; names the weights that differ least.
    """
    own = {k: tuple(v.shape) for k, v in network.state_dict().items()}
    shapes = folded_shapes(checkpoint.shapes)
    nearest: list[str] | None = None
    for prefix in dict.fromkeys(("", checkpoint.prefix)):
        for rename in RENAMINGS.values():
            names = rename(prefix + k for k in shapes)
            if len(set(names.values())) != len(names):
                continue
            keys = {k: names[prefix + k] for k in shapes}
            wrong = differences(own, {new: shapes[old] for old, new in keys.items()})
            if not wrong:
                return keys
            if nearest is None or len(wrong) < len(nearest):
                nearest = wrong
    raise ArtefactError(misfit(checkpoint.path, nearest or []))


def misfit(path: Path, wrong: list[str]) -> str:
    """The message about weights that do not fit the network that was chosen."""
    return (
        f"victim.path={path}: its weights do not fit the network: {several(wrong)}; choose the "
        f"right model= and data=. {REMEDY}"
    )


def several(wrong: list[str], most: int = 6) -> str:
    """Differences in one line."""
    return "; ".join(wrong[:most]) + (f"; and {len(wrong) - most} more" * (len(wrong) > most))
