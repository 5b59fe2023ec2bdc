"""Victims: trained once, stored under the hash of what made them, checked when read."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dhbe.config.identity import fingerprint
from dhbe.contracts.attack import Attack
from dhbe.core.durable import replace, writing
from dhbe.core.errors import ArtefactError
from dhbe.core.locks import exclusive
from dhbe.models import Normalized
from dhbe.training.parallel import agree, first
from dhbe.training.recorder import Stopwatch
from dhbe.training.work import Work

log = logging.getLogger(__name__)

FORMAT = 1
"""Raised when victims made by older code are no longer comparable; part of the hash."""
INDICATOR = "codes"
"""Its name in the file, as in those of earlier versions."""


@dataclass(frozen=True, kw_only=True)
class Victim:
    """A trained network, its attack, and the poison indicator (N,) of its training images.

    Attributes:
        work: of its trainings; None where it was not counted.
        measured: what ``train.measure`` found when it was made; None: made by an earlier version.
        sha256: of the stored weights; None if they are not stored.
    """

    network: Normalized
    attack: Attack
    indicator: Tensor
    seconds: float
    cached: bool
    curves: list[dict[str, float]]
    work: Work | None
    measured: dict[str, float] | None = None
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Making:
    """What making a victim leaves besides its state: poison indicator (N,), curves, work, rates."""

    indicator: Tensor
    curves: list[dict[str, float]]
    work: Work | None
    measured: dict[str, float] = field(default_factory=dict)


class VictimStore:
    """Folders of victims: ``<hash>/victim.safetensors`` and ``<hash>/victim.json``, no pickle."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, recipe: dict[str, Any]) -> Path:
        """Folder of the victim of this recipe."""
        return self.root / fingerprint({"format": FORMAT, **recipe})

    def obtain(
        self,
        recipe: dict[str, Any],
        network: Normalized,
        attack: Attack,
        make: Callable[[Path], Making],
    ) -> Victim:
        """The victim of this recipe: read if it is there, else made and stored, by one process.

        Args:
            recipe: all settings that determine the victim.
            network, attack: freshly built; filled with the victim's state.
            make: trains both in place, given a folder for checkpoints.

        Raises:
            ArtefactError: the stored victim is truncated, edited, or not this recipe's.
        """
        folder = self.folder(recipe)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtefactError(
                f"paths.victims={self.root}: cannot be written ({error})"
            ) from error
        work = self.root / f".{folder.name}.partial"
        with exclusive(folder) if first() else nullcontext():
            if agree(folder.exists()):
                if first():
                    shutil.rmtree(work, ignore_errors=True)  # of one killed after its last step
                return self._read(folder, recipe, network, attack)
            watch = Stopwatch(work)
            made = make(work)
            seconds = watch.seconds
            sha256 = None
            if first():
                sha256 = self._write(folder, recipe, network, attack, made, seconds)
                shutil.rmtree(work, ignore_errors=True)
        return Victim(
            network=network.eval(),
            attack=attack,
            indicator=made.indicator,
            seconds=seconds,
            cached=False,
            curves=made.curves,
            work=made.work,
            measured=made.measured,
            sha256=sha256,
        )

    def _write(
        self,
        folder: Path,
        recipe: dict[str, Any],
        network: Normalized,
        attack: Attack,
        made: Making,
        seconds: float,
    ) -> str:
        """Write into a temporary sibling, then rename: a reader never sees half a victim.

        Returns the SHA-256 of the weights.
        """
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed process: we hold the lock
        temporary.mkdir(parents=True)  # the store may have been deleted meanwhile
        tensors = {INDICATOR: made.indicator}
        for part, module in (("network", network), ("attack", attack)):
            tensors |= {f"{part}.{k}": v.contiguous() for k, v in module.state_dict().items()}
        weights = temporary / "victim.safetensors"
        with writing(weights):
            save_file({k: v.cpu().clone() for k, v in tensors.items()}, weights)
        sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
        about = {"recipe": recipe, "seconds": seconds, "curves": made.curves, "sha256": sha256}
        about |= {"work": made.work and asdict(made.work), "measured": made.measured}
        about["seal"] = fingerprint(about)
        (temporary / "victim.json").write_text(json.dumps(about, indent=1))
        replace(temporary, folder)
        return sha256

    def _read(
        self, folder: Path, recipe: dict[str, Any], network: Normalized, attack: Attack
    ) -> Victim:
        remedy = f"delete {folder} to train it anew"
        try:
            about = json.loads((folder / "victim.json").read_text())
            weights = folder / "victim.safetensors"
            whole = hashlib.sha256(weights.read_bytes()).hexdigest() == about["sha256"]
            if about["recipe"] != json.loads(json.dumps(recipe)):
                raise ArtefactError(f"{folder / 'victim.json'}: edited, not its hash's; {remedy}")
            sealed = about.pop("seal", None)  # victims of before have none
            if sealed is not None and (sealed != fingerprint(about) or "measured" not in about):
                raise ArtefactError(f"{folder / 'victim.json'}: edited; {remedy}")
            if not whole:
                raise ArtefactError(f"{weights}: truncated or edited (SHA-256 differs); {remedy}")
            tensors = load_file(weights)
            counted = about.get("work")  # victims of before have none
            work = counted and Work(**counted)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ArtefactError(f"{folder}: damaged victim ({error}); {remedy}") from error
        indicator = tensors.pop(INDICATOR)
        for part, module in (("network", network), ("attack", attack)):
            own = {k.removeprefix(f"{part}."): v for k, v in tensors.items() if k.startswith(part)}
            module.load_state_dict(own)
        log.info("victim %s read from %s", folder.name, folder)
        return Victim(
            network=network.eval(),
            attack=attack,
            indicator=indicator,
            seconds=float(about["seconds"]),
            cached=True,
            curves=about["curves"],
            work=work,
            measured=about.get("measured"),
            sha256=about["sha256"],
        )
