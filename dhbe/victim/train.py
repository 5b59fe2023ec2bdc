"""Train a victim under an attack, once: the source of ``victim=quick`` and other schedules."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from dhbe.config import identity
from dhbe.contracts.attack import Attack
from dhbe.core.errors import ArtefactError, got
from dhbe.core.types import Batch
from dhbe.data import ImageSet, TrainingBatches, to_float
from dhbe.evaluation.evaluator import Evaluator
from dhbe.models import Normalized
from dhbe.models.interface import DataFitted
from dhbe.training.recorder import Recorder, Stopwatch
from dhbe.training.runtime import Runtime
from dhbe.training.schedule import Schedule
from dhbe.training.supervised import Supervised
from dhbe.victim.source import VictimRequest, VictimSource
from dhbe.victim.store import Making, Victim, VictimStore

log = logging.getLogger(__name__)

MEASURED = 200
"""Training images by which a stored victim is recognised."""
ROUNDING = 0.02
"""By which any of these figures may differ on other hardware."""
FITTED = 5000
"""Training images from which a network may set layers before training."""
_verified: set[str | None] = set()
"""SHA-256 of victims verified in this process: a sweep reads one many times."""


class TrainedVictim(VictimSource):
    """A victim of the config's attack, read from the store or trained by this schedule."""

    trains: ClassVar[bool] = True
    weights_only: ClassVar[bool] = False

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def check(self, attack: Attack) -> None:
        """Every attack makes its own victim here."""

    def obtain(self, request: VictimRequest) -> Victim:
        """The stored victim of this recipe, or a newly trained one.

        Raises:
            ConfigError: there are no images to train on.
            ArtefactError: the stored victim is damaged.
        """
        if request.splits is None or not len(request.splits.train):
            raise got(
                "data", request.spec.name, "a data set to train on", "or set victim=checkpoint"
            )
        images = request.splits.train
        network, attack = self.start(request), request.attack

        def make(folder: Path) -> Making:
            runtime = Runtime(
                trainer_config=request.runtime.trainer_config,
                seed=request.runtime.seed,
                workdir=folder,
                recorder=Recorder(),
                logger=request.runtime.logger,
                stopwatch=Stopwatch(folder),
            )
            network.to(runtime.device, runtime.dtype)
            surrogate = self.surrogate(request) if attack.needs_surrogate else None
            attack.to(runtime.device)
            indicator = train(network, attack, images, self.schedule, runtime, surrogate)
            return Making(
                indicator=indicator,
                curves=runtime.recorder.rows,
                work=runtime.work_total.work,
                measured=measure(network, attack, images, runtime),
            )

        trainer = request.runtime.trainer_config
        recipe = identity.victim_recipe(
            request.config,
            attacked=attack.active,
            images=images.fingerprint(),
            precision=trainer.precision,
            tf32=trainer.tf32,
        )
        store = VictimStore(Path(request.config["paths"]["victims"]))
        victim = store.obtain(recipe, network, attack, make)
        if victim.cached:
            verify(victim, images, request.runtime, store.folder(recipe))
        return victim

    def start(self, request: VictimRequest) -> Normalized:
        """The network that training begins with."""
        network = request.network()
        if request.splits is not None and isinstance(network.network, DataFitted):
            images = request.splits.train
            raw, _ = next(images.batches(torch.arange(min(FITTED, len(images))), FITTED))
            network.network.initialise_from(network.normalize(to_float(raw)))
        return network

    def clean(self, request: VictimRequest) -> Normalized:
        """A clean network that the attacker may look into before training."""
        return self.obtain(request.without_attack()).network

    def surrogate(self, request: VictimRequest) -> Normalized:
        """The clean network, frozen, where and as the training computes."""
        network = self.clean(request).eval().requires_grad_(False)
        return network.to(request.runtime.device, request.runtime.dtype)


def measure(
    network: Normalized, attack: Attack, images: ImageSet, runtime: Runtime
) -> dict[str, float]:
    """Measurements on the first training images that identify a stored victim.

    ``acc`` and ``asr``, and ``change``, the mean change of a pixel by the trigger in 1/255.
    """
    device = runtime.device
    network.to(device, runtime.dtype).eval()
    active = attack.to(device).eval() if attack.active else None
    found = Evaluator(images, active, device=device).observer(MEASURED)(network)
    if active is not None:
        index = torch.arange(min(MEASURED, len(images)))
        raw, _ = next(iter(images.batches(index, MEASURED)))
        x, y = to_float(raw.to(device)), images.labels[index].to(device)
        with torch.inference_mode():
            stamped = active.apply(x, y=y, index=index.to(device))
        found["change"] = 255 * float((stamped - x).abs().mean())
    return found


def verify(victim: Victim, images: ImageSet, runtime: Runtime, folder: Path) -> None:
    """Compare a stored victim with what is known of it, besides its hashes, which can be mended.

    Raises:
        ArtefactError: other images were poisoned, or its rates are not those of its making.
    """
    if victim.sha256 in _verified:
        return
    remedy = f"delete {folder} to train it anew"
    indicator = victim.attack.select(images.labels, runtime.rng("codes"))
    if not torch.equal(indicator.cpu(), victim.indicator.cpu()):
        raise ArtefactError(
            f"{folder}: its poison indicator is not that of its seed: edited; {remedy}"
        )
    if victim.measured is None:
        log.warning("%s: made by an earlier version, without rates to compare it with", folder)
    else:
        found = measure(victim.network, victim.attack, images, runtime)
        for name in sorted(found.keys() | victim.measured.keys()):
            before = victim.measured.get(name)
            if not _near(found.get(name), before):
                raise ArtefactError(
                    f"{folder}: {name} {found.get(name)} on training images, but {before} when it "
                    f"was made: edited; {remedy}"
                )
    _verified.add(victim.sha256)


def _near(found: object, before: object) -> bool:
    numbers = isinstance(found, (int, float)) and isinstance(before, (int, float))
    return numbers and abs(found - before) <= ROUNDING  # type: ignore[operator]


def train(
    network: Normalized,
    attack: Attack,
    images: ImageSet,
    schedule: Schedule,
    runtime: Runtime,
    surrogate: Normalized | None = None,
) -> Tensor:
    """Train the network under the attack, in place; returns the poison indicator (N,), int8.

    Args:
        surrogate: a clean network, for attacks that need one.
    """
    indicator = attack.select(images.labels, runtime.rng("codes"))
    attack.prepare(images, indicator, runtime, surrogate)
    attack.train()  # an evaluation may have left it, and its networks, in eval mode
    controls = attack.controls_training
    given = images if controls else attack.poison(images, indicator, seed=runtime.seed)
    batches = TrainingBatches(
        given,
        spec=replace(attack.spec, augmentation=attack.augmentation),
        batch_size=schedule.batch_size,
        seed=runtime.derive("victim"),
        device=runtime.device,
        indicator=indicator,
        compose=attack.compose if controls else None,
    )

    def loss(net: torch.nn.Module, batch: Batch) -> Tensor:
        return attack.loss(net, batch.images.to(runtime.dtype), batch.labels, batch.indicator)

    module = Supervised(
        network,
        batches,
        schedule,
        role="victim",
        loss=loss,
        players=attack.players(),
        beside=attack,
        before_epoch=attack.begin_epoch,
    )
    runtime.fit(module, batches, epochs=schedule.epochs, networks=[network])
    attack.eval()
    return indicator
