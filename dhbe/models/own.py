"""A user's own network, made by their code: ``model=own model.factory=mynet.py:build``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import math
import os
import sys
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from dhbe.core.errors import ConfigError, got

KEY = "model.factory"
SIZES = {
    "classes": ("classes", "num_classes", "n_classes", "nb_classes", "num_class"),
    "channels": ("channels", "in_channels", "in_chans", "input_channels", "num_channels"),
    "image_size": ("image_size", "img_size", "input_size"),
}
"""What a factory may call the sizes that the data tell."""
TRIALS = (32, 28, 64, 224, 96, 48, 128, 40, 56, 299, 256, 16)
"""Sides of images, commonest first."""
FREE = (32, 64, 96)
"""A network that takes all of these takes any size."""
REMEDY = (
    "model=own model.factory=mynet.py:build takes any network: a function of yours that returns it "
    "without weights (docs/purify.md)"
)


def own(
    *,
    factory: str,
    options: dict[str, Any],
    sha256: str,
    classes: int | None,
    channels: int | None,
    image_size: int | None,
) -> nn.Module:
    """What the user's ``factory`` returns; sizes are passed if it takes them by name.

    Args:
        factory: ``FILE.py:NAME``, or ``package.module:NAME``; a function or class.
        options: further arguments.
        sha256: of the file: other code is another network; not checked.

    Raises:
        ConfigError: no such file or name, the factory fails, or it returns no module.
    """
    del sha256
    make = found(factory)
    sizes = {"classes": classes, "channels": channels, "image_size": image_size}
    taken = inspect.signature(make).parameters
    arguments = {
        alias: sizes[name]
        for name, aliases in SIZES.items()
        for alias in aliases
        if alias in taken and sizes[name] is not None
    }
    try:
        network = make(**(arguments | options))
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{KEY}={factory}: failed ({said}); called with {arguments}") from error
    if not isinstance(network, nn.Module):
        raise got(KEY, factory, f"a function that returns a torch.nn.Module, not {type(network)}")
    return network


def found(factory: str) -> Any:
    """The function or class that ``FILE.py:NAME`` or ``package.module:NAME`` names.

    Raises:
        ConfigError: there is none.
    """
    place, _, name = factory.rpartition(":")
    if not place or not name:
        raise got(KEY, factory, "FILE.py:NAME or package.module:NAME")
    try:
        module = from_file(Path(place)) if place.endswith(".py") else imported(place)
        return attrgetter(name)(module)
    except (ImportError, OSError, AttributeError, SyntaxError) as error:
        raise ConfigError(f"{KEY}={factory}: {type(error).__name__}: {error}") from error


def from_file(file: Path) -> ModuleType:
    """The module in a file; it may import what lies beside it."""
    path = file.expanduser().resolve()
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    name = f"own_{hashlib.blake2b(str(path).encode(), digest_size=4).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def imported(name: str) -> ModuleType:
    """An installed module, or one below the working directory."""
    sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(os.getcwd())


def digest_of(factory: str) -> str:
    """SHA-256 of the file that a factory lies in; empty for installed modules."""
    file = Path(factory.rpartition(":")[0]).expanduser()
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def channels_of(network: nn.Module) -> int | None:
    """Channels of the images, from the first convolution, else from the first linear layer.

    An input of that layer counts as an image of one or three channels if its size is a square.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            return module.in_channels
        if isinstance(module, nn.Linear):
            pixels = {c: module.in_features / c for c in (3, 1)}
            return next((c for c, n in pixels.items() if n == math.isqrt(int(n)) ** 2), None)
    return None


@torch.no_grad()
def sides_of(network: nn.Module, channels: int, sides: tuple[int, ...] = TRIALS) -> list[int]:
    """Those of ``sides`` whose images the network takes, tried with one image each."""
    taken = []
    network = network.eval()
    for side in sides:
        try:
            out = network(torch.zeros(1, channels, side, side))
        except (RuntimeError, ValueError, AssertionError, IndexError):
            continue
        if not isinstance(out, Tensor) or len(out) == 1:  # else it was cut into several images
            taken.append(side)
    return taken


def side_of(network: nn.Module, channels: int) -> int | None:
    """The one common side of images that the network takes; None if it takes any, or no common."""
    if len(sides_of(network, channels, FREE)) == len(FREE):
        return None
    return next(iter(sides_of(network, channels)), None)


@torch.no_grad()
def classes_of(network: nn.Module, channels: int, image_size: int) -> int | None:
    """Outputs per image; None if they are no row of numbers, or the network takes no such image."""
    try:
        out = network.eval()(torch.zeros(1, channels, image_size, image_size))
    except (RuntimeError, ValueError, AssertionError, IndexError):
        return None
    return out.shape[1] if isinstance(out, Tensor) and out.ndim == 2 else None
