"""The state dict inside a file, and the ``victim=checkpoint`` that comes from it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dhbe.checkpoint.files import DAMAGE, MAX_TENSORS, Place, open_weights
from dhbe.checkpoint.layouts import RENAMINGS, Shape, differences
from dhbe.checkpoint.pickles import Opaque, Refused, shown
from dhbe.core.errors import ArtefactError, ConfigError
from dhbe.models import Normalized

NESTS = ("model", "state_dict", "net", "network", "model_state_dict", "netC", "weights", "params")
"""Keys under which checkpoints keep their state dict, first choice first."""
PREFIXES = ("module", "model", "network", "net", "backbone", "_orig_mod", "1")
"""What wrappers put before every key; ``1`` is the network behind a normalisation layer."""
MAX_NESTING = 4
MAX_NAME = 300
"""Characters of a weight's name; the longest of known networks have 80."""
STATISTICS = ("mean", "std")
UNWRITTEN = "unwritten"
"""Metadata of this project's files: what the network has that no weight says."""


class Checkpoint:
    """A file's state dict: names, shapes and places; tensors are read when asked for.

    Attributes:
        places: key as in the network (wrappers' prefixes removed) -> where the tensor lies.
        original: the same keys -> as the file has them.
        others: tensors of the same dict that belong to no network (``criterion.weight``).
        facts: what else the file says in plain words and numbers, such as ``num_classes``.

    Raises:
        ArtefactError: missing, damaged, too large, no state dict inside, or more than data.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file = open_weights(path)
            found = state_dict(self.file.content)
        except Refused as error:
            if not path.is_file():
                raise ArtefactError(f"victim.path={path}: no such file") from None
            raise self.refusal(error) from error
        except OSError as error:
            raise ArtefactError(f"victim.path={path}: cannot be read ({error})") from error
        prefix = wrapper(found)
        inside = [k for k in found if k.startswith(prefix)]
        self.places = {k.removeprefix(prefix): found[k] for k in inside}
        self.original = {k.removeprefix(prefix): k for k in inside}
        self.others = {k: p for k, p in found.items() if not k.startswith(prefix)}
        self._last: tuple[str, bytearray] = ("", bytearray())
        said = {k: listed(v) for k, v in self.file.metadata.items()}
        self.facts = dict(facts(self.file.content)) | said
        if sum(p.nbytes for p in found.values()) > 2 * path.stat().st_size:
            raise ArtefactError(
                f"victim.path={path}: its tensors claim more than the file holds; not read"
            )

    def refusal(self, error: Refused) -> ArtefactError:
        """The error with the file's name and what it means for the reader."""
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
        """One tensor of ``others``."""
        return self._read(name, self.others[name])

    def _read(self, name: str, place: Place) -> Tensor:
        try:
            if self._last[0] != place.record:  # many tensors may share one
                self._last = (place.record, self.file.read(place.record))
            value = place.view(self._last[1]).clone()
        except Refused as error:
            raise self.refusal(error) from error
        except DAMAGE as error:
            raise self.refusal(Refused(f"damaged ({shown(error, 200)})")) from error
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
            name = key.rpartition(".")[2].lstrip("_")
            if name in STATISTICS and 1 <= place.nbytes // place.dtype.itemsize <= 4:
                found[name] = self.other(key).double().flatten().tolist()
        return {k: found[k] for k in STATISTICS} if len(found) == len(STATISTICS) else None

    def write(self, folder: Path, weights: Mapping[str, Tensor]) -> Path:
        """A copy of the file in ``folder`` with other weights, of the same shapes and types.

        The name gets ``-purified`` added. Of a program (TorchScript, torch.export) only the
        weights are written, as safetensors under the program's own keys: its code is unread.

        Raises:
            ArtefactError: a weight does not fit the file's number type.
        """
        stem = f"{self.path.stem}-purified"
        places = {k: self.places[k] for k in weights}
        buffers = {p.record: self.file.read(p.record) for p in places.values()}
        views = {k: p.view(buffers[p.record]) for k, p in places.items()}
        for key, view in views.items():
            view.copy_(weights[key])
        for key, view in views.items():  # after all: some may share their memory
            if not torch.equal(view, weights[key].to(view.dtype)):
                raise ArtefactError(
                    f"victim.path={self.path}: {key} shares its place in the file with another "
                    "weight that is no longer equal; the file cannot hold both"
                )
            if view.is_floating_point() and not view.isfinite().all():
                raise ArtefactError(
                    f"victim.path={self.path}: the purified {key} does not fit {view.dtype}"
                )
        if self.file.program:
            target = folder / f"{stem}.safetensors"
            save_file({self.original[k]: v.clone() for k, v in views.items()}, target)
            return target
        target = folder / f"{stem}{self.path.suffix}"
        self.file.write(target, {k: bytes(v) for k, v in buffers.items()})
        return target


def state_dict(content: Any) -> dict[str, Place]:
    """The state dict inside a file's content.

    Raises:
        Refused: there is none.
    """
    for _ in range(MAX_NESTING):
        if not isinstance(content, dict):
            break
        tensors = {k: v for k, v in content.items() if isinstance(v, Place)}
        nested = next((content[k] for k in NESTS if isinstance(content.get(k), dict)), None)
        if tensors and (nested is None or len(tensors) == len(content)):
            if any(not isinstance(k, str) or len(k) > MAX_NAME for k in tensors):
                raise Refused(f"a weight without a name, or one of more than {MAX_NAME} letters")
            if len(tensors) > MAX_TENSORS:
                raise Refused(f"{len(tensors):,} tensors; at most {MAX_TENSORS:,}")
            if 2 * len(tensors) > len(content):  # odd entries beside weights stay as they are
                return tensors
        content = nested
    raise Refused(f"no state dict of tensors, neither on top nor under {', '.join(NESTS)}")


def wrapper(keys: Mapping[str, Any]) -> str:
    """The prefix that wrappers put before most keys; empty if there is none."""
    found = ""
    for _ in range(MAX_NESTING):
        inside = [k for k in keys if k.startswith(found)]
        longer = [f"{found}{p}." for p in PREFIXES]
        counts = {p: sum(k.startswith(p) for k in inside) for p in longer}
        best = max(longer, key=lambda p: counts[p])
        if 2 * counts[best] <= len(inside):
            break
        found = best
    return found


def listed(text: str) -> Any:
    """The numbers of a text like ``[0.5, 0.5]``, which is how safetensors can hold them."""
    if not re.fullmatch(r"\[[\d.,\s]{1,100}\]", text, re.ASCII):
        return text
    try:
        return [float(n) for n in text.strip("[]").split(",")]
    except ValueError:
        return text


def facts(content: Any) -> Iterator[tuple[str, Any]]:
    """Plain values beside the weights: on top, in ``args``, in ``hyper_parameters``."""
    if not isinstance(content, dict):
        return
    for key in ("args", "hyper_parameters"):
        inner = content.get(key)
        if isinstance(inner, Opaque):
            inner = inner.state if isinstance(inner.state, dict) else inner.items
        if isinstance(inner, dict):
            content = {**inner, **content}
    for key, value in content.items():
        several = list(value) if isinstance(value, (list, tuple)) and len(value) <= 4 else [value]
        kinds = (int, float) if isinstance(value, (list, tuple)) else (int, float, str)
        if all(isinstance(v, kinds) and len(str(v)) <= MAX_NAME for v in several):
            yield str(key), value


class CheckpointFile:
    """A file of weights that takes the place of a trained victim.

    Args:
        sha256: of the file; filled in when the run begins and checked when the weights are read.
        assumed: what the file does not say and was assumed, in words; filled in likewise.
    """

    def __init__(self, *, path: str, sha256: str = "", assumed: list[str] | None = None) -> None:
        self.path, self.sha256 = Path(path), sha256
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
        keys = matched(checkpoint, network)
        own = network.network.state_dict()
        weights = {keys[k]: checkpoint.read(k) for k in checkpoint.places}
        for key, value in weights.items():
            if own[key].is_floating_point() and not value.is_floating_point():
                raise ArtefactError(
                    f"victim.path={self.path}: {key} is made of {value.dtype}; a quantised file "
                    "has no weights to purify"
                )
        network.network.load_state_dict(own | weights)
        if checkpoint.others.keys() == set(STATISTICS):  # a file of this project
            for name in STATISTICS:
                own_value = getattr(network, name)
                value = checkpoint.other(name)
                if value.shape != own_value.shape:
                    wrong = [f"{name} is {tuple(value.shape)}, expected {tuple(own_value.shape)}"]
                    raise ArtefactError(misfit(self.path, wrong, len(own)))
                own_value.copy_(value)
        return checkpoint

    def unchanged(self) -> Checkpoint:
        """The file, opened.

        Raises:
            ArtefactError: it is not the one that the run began with.
        """
        checkpoint = Checkpoint(self.path)
        if self.sha256 and self.sha256 != digest(self.path):
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
        keys = matched(checkpoint, network)
        return checkpoint.write(folder, {k: own[new].cpu() for k, new in keys.items()})


def matched(checkpoint: Checkpoint, network: Normalized) -> dict[str, str]:
    """Key of the file -> key of the network, by the layout that fits.

    Raises:
        ArtefactError: none does; names the weights that differ least.
    """
    own = {k: tuple(v.shape) for k, v in network.network.state_dict().items()}
    shapes = checkpoint.shapes
    nearest: list[str] | None = None
    for rename in RENAMINGS.values():
        keys = rename(shapes)
        if len(set(keys.values())) != len(keys):
            continue
        wrong = differences(own, {new: shapes[old] for old, new in keys.items()})
        if not wrong:
            return keys
        if nearest is None or len(wrong) < len(nearest):
            nearest = wrong
    raise ArtefactError(misfit(checkpoint.path, nearest or [], len(own)))


def misfit(path: Path, wrong: list[str], total: int) -> str:
    """The message about weights that do not fit."""
    shown = "; ".join(wrong[:6]) + ("; ..." if len(wrong) > 6 else "")
    return (
        f"victim.path={path}: {len(wrong)} of {total} weights do not fit the network ({shown}); "
        "choose the right model= and data="
    )


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            found.update(part)
    return found.hexdigest()
