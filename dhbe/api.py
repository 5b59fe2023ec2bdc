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

from dhbe.checkpoint.inference import suspected
from dhbe.config import schema as config
from dhbe.config.resolvers import register_resolvers
from dhbe.core.errors import got
from dhbe.core.paths import CONF
from dhbe.experiment.pipeline import Given, assemble, compute
from dhbe.experiment.results import ResultFolder


def purify(
    model: nn.Module,
    *,
    image_size: int,
    classes: int,
    channels: int = 3,
    normalization: str | Mapping[str, Sequence[float]] = "none",
    defense: str = "dhbe",
    scale: str = "quick",
    clean: str | Path | None = None,
    test: str | Path | None = None,
    trigger: str | Path | None = None,
    report: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> nn.Module:
    """A purified copy of a classifier, in eval mode, on the CPU; ``model`` stays as it is.

    Args:
        model: normalised images (B, channels, image_size, image_size) -> logits (B, classes).
        normalization: what stands before the model: ``none`` for pixels in [0, 1], a preset such
            as ``cifar10`` or ``imagenet``, or ``{"mean": [...], "std": [...]}`` per channel.
        defense: a config of ``conf/defense``.
        scale: ``quick`` or ``cpu`` fit it to a CPU; ``paper`` is the published setting, for GPUs.
        clean: folder ``<clean>/<class>/<image>`` for defenses that need images.
        test: folder likewise; measures accuracy before and after, for the report.
        trigger: picture of a suspected trigger, tried on ``test``, for the report.
        report: folder for ``report.html``, ``metrics.json`` and the evidence, as from
            ``dhbe-purify``; it must be new or empty.
        overrides: further choices as on the command line, such as ``defense.epochs=20`` or
            ``attack.target_class=3``.

    Raises:
        ConfigError: an unknown choice, or a defense that these data or this model do not fit.
        ArtefactError: the model holds NaN or infinite weights.
        DataError: images that cannot be read.
        DivergenceError: the purified model would hold NaN or infinite weights.
    """
    choices = {"data": "own", "attack": "none", "model": type(model).__name__, "defense": defense}
    choices["scale"] = scale
    choices["budget"] = "own" if clean else "none"
    tree = composed(
        [
            *("task=purify", "checkpoint=given", "model=resnet_tiny"),
            *(f"defense={defense}", f"scale={scale}", f"budget={choices['budget']}", *overrides),
        ]
    )
    tree["data"] |= {
        "classes": classes,
        "channels": channels,
        "image_size": image_size,
        "normalization": _plain(normalization),
        "clean": None if clean is None else str(clean),
        "test": None if test is None else str(test),
    }
    tree["trigger"] = None if trigger is None else str(trigger)
    tree, choices = suspected(tree, choices)
    parts = assemble(tree)
    parts.victim = Given(network=copy.deepcopy(model).cpu().eval())
    with TemporaryDirectory() as scratch:
        folder = ResultFolder(Path(scratch) / "result" if report is None else Path(report))
        if report is None:
            parts.probe = None
        elif folder.complete:
            raise got("report", report, "a new or empty folder")
        with folder.claimed():
            _, purified = compute(tree, parts, folder, choices, None)
    inner: nn.Module = purified.network
    return inner.to(device="cpu", dtype=torch.float32).eval()


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
