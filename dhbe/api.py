"""Purify a network in memory: ``dhbe.purify(model, ...)``."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.initialize import get_gh_backup, restore_gh_from_backup
from torch import nn

from dhbe import config
from dhbe.data import DefenderData, OwnImages
from dhbe.entry import register_resolvers
from dhbe.models import Normalized
from dhbe.runtime import Runtime
from dhbe.types import Suspect

CONF = Path(__file__).parent.parent / "conf"
"""Installed beside this package, as in the checkout."""


def purify(
    model: nn.Module,
    *,
    image_size: int,
    classes: int,
    channels: int = 3,
    normalization: str | Mapping[str, Sequence[float]] = "none",
    defense: str = "dhbe_quick",
    clean: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> nn.Module:
    """A purified copy of a classifier, in eval mode, on the CPU; ``model`` stays as it is.

    Args:
        model: normalised images (B, channels, image_size, image_size) -> logits (B, classes).
        normalization: what stands before the model: ``none`` for pixels in [0, 1], a preset such
            as ``cifar10`` or ``imagenet``, or ``{"mean": [...], "std": [...]}`` per channel.
        defense: a config of ``conf/defense``; ``dhbe`` is the published setting, for GPUs.
        clean: folder ``<clean>/<class>/<image>`` for defenses that need images.
        overrides: further choices as on the command line, such as ``defense.epochs=20``.

    Raises:
        ConfigError: an unknown choice, or a defense that these data or this model do not fit.
        ArtefactError: the model holds NaN or infinite weights.
        DivergenceError: the purified one would.
    """
    tree = composed(
        ["data=own", f"defense={defense}", f"budget={'own' if clean else 'none'}", *overrides]
    )
    tree["data"] |= {
        "classes": classes,
        "channels": channels,
        "image_size": image_size,
        "normalization": _plain(normalization),
        "clean": None if clean is None else str(clean),
    }
    groups = ("data", "defense", "budget", "trainer")
    config.validate({k: tree[k] for k in ("seed", *groups)}, groups)
    data: OwnImages = config.build(tree["data"])
    method, budget = config.build(tree["defense"]), config.build(tree["budget"])
    method.check(budget)
    method.fits(data.spec)
    splits = data.load()
    granted = DefenderData(
        budget,
        pool=splits.pool if splits else None,
        train_size=len(splits.pool) if splits else 0,
        seed=tree["seed"],
    )
    network = Normalized(copy.deepcopy(model).cpu(), data.spec).eval()
    suspect = Suspect(network=network, architecture=type(model).__name__, spec=data.spec)
    with TemporaryDirectory() as work:
        runtime = Runtime(
            trainer_config=config.build(tree["trainer"]), seed=tree["seed"], workdir=Path(work)
        )
        purified: Normalized = method(suspect, granted, runtime)
    return purified.network.to(device="cpu", dtype=torch.float32).eval()


def composed(overrides: Sequence[str]) -> dict[str, Any]:
    """The config with these choices; a Hydra program that calls this keeps its own state."""
    register_resolvers()
    outer = get_gh_backup()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return config.plain(compose("config", overrides=list(overrides)))
    finally:
        restore_gh_from_backup(outer)


def _plain(normalization: str | Mapping[str, Sequence[float]]) -> Any:
    if isinstance(normalization, str):
        return normalization
    return {k: [float(v) for v in values] for k, values in normalization.items()}
