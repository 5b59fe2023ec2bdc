"""Train a victim under an attack."""

from __future__ import annotations

import torch
from torch import Tensor

from dhbe.contracts.attack import Attack
from dhbe.core.types import Batch
from dhbe.data import ImageSet, TrainingBatches
from dhbe.models import Normalized
from dhbe.training.runtime import Runtime
from dhbe.training.schedule import Schedule
from dhbe.training.supervised import Supervised


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
        spec=attack.spec,
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
