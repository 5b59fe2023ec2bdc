"""Train a victim under an attack, once: the source of ``victim=quick`` and other schedules."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from dhbe.config import identity
from dhbe.contracts.attack import Attack
from dhbe.core.errors import ConfigError
from dhbe.core.types import Batch
from dhbe.data import ImageSet, TrainingBatches
from dhbe.models import Normalized
from dhbe.training.recorder import Recorder, Stopwatch
from dhbe.training.runtime import Runtime
from dhbe.training.schedule import Schedule
from dhbe.training.supervised import Supervised
from dhbe.victim.source import VictimRequest, VictimSource
from dhbe.victim.store import Making, Victim, VictimStore


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
        if request.splits is None:
            raise ConfigError(
                "data=unknown has no images to train on; set victim=checkpoint or data="
            )
        images = request.splits.train
        network, attack = request.network(), request.attack

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
            surrogate = self._surrogate(request) if attack.needs_surrogate else None
            attack.to(runtime.device)
            codes = train(network, attack, images, self.schedule, runtime, surrogate)
            return Making(codes=codes, curves=runtime.recorder.rows, work=runtime.work_total.work)

        trainer = request.runtime.trainer_config
        recipe = identity.victim_recipe(
            request.config,
            attacked=attack.active,
            images=images.fingerprint(),
            precision=trainer.precision,
            tf32=trainer.tf32,
        )
        store = VictimStore(Path(request.config["paths"]["victims"]))
        return store.obtain(recipe, network, attack, make)

    def _surrogate(self, request: VictimRequest) -> Normalized:
        """The clean network of the same recipe, frozen."""
        network = self.obtain(request.without_attack()).network
        runtime = request.runtime
        return network.to(runtime.device, runtime.dtype).requires_grad_(False)


def train(
    network: Normalized,
    attack: Attack,
    images: ImageSet,
    schedule: Schedule,
    runtime: Runtime,
    surrogate: Normalized | None = None,
) -> Tensor:
    """Train the network under the attack, in place; returns the codes (N,) int8.

    Args:
        surrogate: a clean network, for attacks that need one.
    """
    codes = attack.select(images.labels, runtime.rng("codes"))
    attack.prepare(images, codes, runtime, surrogate)
    attack.train()  # whoever evaluated before has left it in eval mode, its networks included
    controls = attack.controls_training
    given = images if controls else attack.poison(images, codes, seed=runtime.seed)
    batches = TrainingBatches(
        given,
        spec=replace(attack.spec, augmentation=attack.augmentation),
        batch_size=schedule.batch_size,
        seed=runtime.derive("victim"),
        device=runtime.device,
        codes=codes,
        compose=attack.compose if controls else None,
    )

    def loss(net: torch.nn.Module, batch: Batch) -> Tensor:
        return attack.loss(net, batch.images.to(runtime.dtype), batch.labels, batch.codes)

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
    return codes
