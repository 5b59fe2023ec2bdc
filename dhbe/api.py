"""Networks in memory: ``dhbe.purify(model)`` and ``dhbe.scan(model)``."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.initialize import get_gh_backup, restore_gh_from_backup
from torch import nn

from dhbe.checkpoint.inference import chosen, described, doubted
from dhbe.checkpoint.preprocessing import told
from dhbe.checkpoint.recognition import sizes
from dhbe.config import identity
from dhbe.config import schema as config
from dhbe.config.resolution import with_trigger
from dhbe.config.resolvers import register_resolvers
from dhbe.core.errors import ConfigError, got
from dhbe.core.paths import CONF
from dhbe.experiment.assembly import assemble
from dhbe.experiment.folder import ResultFolder
from dhbe.experiment.pipeline import compute
from dhbe.models import Normalized
from dhbe.models.interface import prepared, unhooked
from dhbe.models.own import channels_of, classes_of, side_of
from dhbe.victim.memory import InMemoryVictim

log = logging.getLogger(__name__)


def purify(
    model: nn.Module,
    *,
    image_size: int | None = None,
    classes: int | None = None,
    channels: int | None = None,
    normalization: str | Mapping[str, Sequence[float]] | None = None,
    defense: str = "auto",
    scale: str = "quick",
    clean: str | Path | None = None,
    test: str | Path | None = None,
    trigger: str | Path | None = None,
    report: str | Path | None = None,
    progress: bool | None = None,
    overrides: Sequence[str] = (),
) -> nn.Module:
    """A purified copy of a classifier, in eval mode, on the CPU; ``model`` stays as it is.

    Args:
        model: any module from normalised images (B, channels, image_size, image_size) to logits
            (B, classes), or to their softmax.
        image_size, classes, channels: inferred by trial passes where None; a network that accepts
            images of any size needs ``image_size``.
        normalization: what stands before the model: ``none`` for pixels in [0, 1], a preset such
            as ``cifar10`` or ``imagenet``, or ``{"mean": [...], "std": [...]}`` per channel. None
            asks the model, and is ``none``, with a warning, where it does not tell.
        defense: a config of ``conf/defense``.
        scale: ``quick`` or ``cpu`` fit it to a CPU; ``paper`` is the published setting, for GPUs.
        clean: folder ``<clean>/<class>/<image>`` for defenses that need images.
        test: folder likewise; measures accuracy before and after, for the report.
        trigger: picture of a suspected trigger, tried on ``test``, for the report.
        report: folder for ``report.html``, ``metrics.json`` and the evidence, as from
            ``dhbe-purify``; it must be new or empty.
        progress: draw progress bars; None draws them on a terminal.
        overrides: further choices as on the command line, such as ``defense.epochs=20`` or
            ``attack.target_class=3``.

    Raises:
        ConfigError: an unknown choice, a defense that these data or this model do not fit, or a
            model that takes or gives something else.
        ArtefactError: the model holds NaN or infinite weights.
        DataError: images that cannot be read.
        DivergenceError: the purified model would hold NaN or infinite weights.
    """
    data: dict[str, Any] = {"classes": classes, "channels": channels, "image_size": image_size}
    data |= {
        "normalization": _plain(normalization),
        "clean": None if clean is None else str(clean),
        "test": None if test is None else str(test),
    }
    choices = {"defense": defense, "scale": scale, "budget": "own" if clean else "none"}
    tree = _tree(choices, data, progress, overrides)
    tree["trigger"] = None if trigger is None else str(trigger)
    _, purified = _computed(model, tree, choices, report)
    inner: nn.Module = unhooked(purified.network)
    return inner.to(device="cpu", dtype=torch.float32).eval()


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a scan found; the scores are not calibrated.

    Attributes:
        classes: that stand out, as the target of a backdoor does; none is no proof.
        scores: how far each class stands out (K,); the network is suspected from ``threshold``.
        notes: the evidence, and what was assumed of the model.
    """

    classes: list[int]
    scores: list[float]
    threshold: float
    notes: list[str]


def scan(
    model: nn.Module,
    *,
    image_size: int | None = None,
    classes: int | None = None,
    channels: int | None = None,
    normalization: str | Mapping[str, Sequence[float]] | None = None,
    report: str | Path | None = None,
    progress: bool | None = None,
    overrides: Sequence[str] = (),
) -> Verdict:
    """Look for the target class of a backdoor, without data; ``model`` stays as it is.

    Arguments and errors are those of ``purify``.
    """
    data: dict[str, Any] = {"classes": classes, "channels": channels, "image_size": image_size}
    data |= {"normalization": _plain(normalization), "clean": None, "test": None}
    choices = {"defense": "scan", "scale": "quick", "budget": "none"}
    tree = _tree(choices, data, progress, overrides)
    metrics, _ = _computed(model, tree, choices, report)
    return Verdict(
        classes=metrics["suspected"]["classes"],
        scores=metrics["suspected"]["scores"],
        threshold=tree["defense"]["threshold"],
        notes=metrics["notes"],
    )


def _tree(
    choices: dict[str, str], data: dict[str, Any], progress: bool | None, overrides: Sequence[str]
) -> dict[str, Any]:
    """The config of a task on a network in memory, with what is said of its images."""
    bars = [] if progress is None else [f"trainer.progress={'always' if progress else 'never'}"]
    chosen = [f"{group}={choice}" for group, choice in choices.items()]
    tree = composed(
        ["task=purify", "checkpoint=given", "model=resnet_tiny", *chosen, *bars, *overrides]
    )
    tree["data"] |= data
    listed = tree["data"]["class_names"]
    named = (data["clean"], data["test"], listed if isinstance(listed, str) else None)
    tree["data"]["content"] = identity.content(Path(f) for f in named if f is not None)
    return tree


def _computed(
    model: nn.Module, tree: dict[str, Any], choices: dict[str, str], report: str | Path | None
) -> tuple[dict[str, Any], Normalized]:
    """Metrics and purified network; in a temporary folder, or in ``report``, which is kept."""
    network = copied(model).to(device="cpu", dtype=torch.float32).eval()
    notes = fitted(network, tree["data"])
    choices = {"data": "own", "attack": "none", "model": type(model).__name__} | choices
    tree, choices = with_trigger(tree, choices)
    parts = assemble(tree, InMemoryVictim(network, notes))
    with TemporaryDirectory() as scratch:
        folder = ResultFolder(Path(scratch) / "result" if report is None else Path(report))
        if report is None:
            parts.probe = None
        elif folder.complete:
            raise got("report", report, "a new or empty folder")
        with folder.claimed():
            return compute(tree, parts, folder, choices, None)


def copied(model: nn.Module) -> nn.Module:
    """Deep copy of the model.

    Raises:
        ConfigError: the model holds what cannot be copied.
    """
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"model={type(model).__name__}: cannot be copied ({error}); fold weights that are "
            "computed in every pass, such as torch.nn.utils.remove_weight_norm does"
        ) from error


def fitted(network: nn.Module, data: dict[str, Any]) -> list[str]:
    """Fill in ``data`` from the network and adapt the network to it; returns notes.

    Raises:
        ConfigError: its images' size or its classes are not known, or it gives no logits.
    """
    data["channels"] = data["channels"] or channels_of(network) or 3
    data["image_size"] = data["image_size"] or side_of(network, data["channels"])
    if not data["image_size"]:
        raise got("image_size", None, "a number of pixels: the model takes images of any size")
    data["classes"] = data["classes"] or classes_of(network, data["channels"], data["image_size"])
    if not data["classes"]:
        allowed = "a model from images (B, channels, image_size, image_size) to logits (B, classes)"
        said = f"{type(network).__name__} with {sizes(data)}"
        raise got("model", said, allowed, "say classes= to see what it gives instead")
    notes = prepared(network, described(data))
    verdict = told(network, **sizes(data))
    if data["normalization"] is None:
        notes.append(chosen(verdict, data, otherwise="none"))
        if verdict.preset is None:
            log.warning("%s", notes[-1])
    elif doubt := doubted(verdict, data):
        notes.append(doubt)
        log.warning("%s", doubt)
    return notes


def composed(overrides: Sequence[str]) -> dict[str, Any]:
    """Compose the config with these overrides; the Hydra state of the caller is restored."""
    register_resolvers()
    outer = get_gh_backup()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return config.plain(compose("config", overrides=list(overrides)))
    finally:
        restore_gh_from_backup(outer)


def _plain(normalization: str | Mapping[str, Sequence[float]] | None) -> Any:
    if normalization is None or isinstance(normalization, str):
        return normalization
    return {k: [float(v) for v in values] for k, values in normalization.items()}
