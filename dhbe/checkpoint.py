"""Somebody else's weights: read without executing code, matched by name and shape."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dhbe.errors import ArtefactError
from dhbe.models import Normalized

NESTS = ("model", "state_dict", "net", "network")
"""Keys under which checkpoints keep their state dict."""
PREFIXES = ("module.", "model.", "network.", "net.")
"""Prefixes that wrappers put before every key."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """State dict of a ``.safetensors``, ``.pt`` or ``.pth`` file.

    Raises:
        ArtefactError: missing, not such a file, or a pickle that holds more than tensors.
    """
    if not path.is_file():
        raise ArtefactError(f"victim.path={path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ArtefactError(
            f"victim.path={path}: not a safetensors file or a plain state dict ({error}); "
            "nothing in it was executed"
        ) from error
    for key in NESTS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ArtefactError(f"victim.path={path}: expected a state dict of tensors")
    return content


class CheckpointFile:
    """A file of weights that takes the place of a trained victim."""

    def __init__(self, *, path: str) -> None:
        self.path = Path(path)

    def load_into(self, network: Normalized) -> None:
        """Fill ``network`` with the file's weights.

        A file of this project also holds the normalisation; others only the network behind it.

        Raises:
            ArtefactError: a weight is missing, left over or of another shape.
        """
        tensors = read_tensors(self.path)
        target: torch.nn.Module = network
        if not {"mean", "std"} <= tensors.keys():
            target = network.network
            for prefix in PREFIXES:
                if all(k.startswith(prefix) for k in tensors):
                    tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
        own = target.state_dict()
        wrong = [f"missing {k}" for k in own.keys() - tensors.keys()]
        wrong += [f"unknown {k}" for k in tensors.keys() - own.keys()]
        wrong += [
            f"{k} is {tuple(tensors[k].shape)}, expected {tuple(own[k].shape)}"
            for k in own.keys() & tensors.keys()
            if own[k].shape != tensors[k].shape
        ]
        if wrong:
            shown = "; ".join(sorted(wrong)[:6]) + ("; ..." if len(wrong) > 6 else "")
            raise ArtefactError(
                f"victim.path={self.path}: {len(wrong)} of {len(own)} weights do not fit the "
                f"network ({shown}); choose the right model= and data="
            )
        target.load_state_dict(tensors)
