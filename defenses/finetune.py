"""Fine-tuning on a few clean images: cross-entropy, all parameters (BackdoorBench's ``ft``)."""

from __future__ import annotations

from typing import ClassVar

from dhbe.contracts.defense import Defense
from dhbe.data import Budget, DefenderData, TrainingBatches
from dhbe.models import Normalized
from dhbe.training.runtime import Runtime
from dhbe.training.schedule import Schedule
from dhbe.training.supervised import Supervised


class FineTune(Defense):
    """Train on the granted clean images, augmented as the data set allows, in train mode.

    Args:
        schedule: SGD and its learning rate; BackdoorBench: 0.01 cosine, batch 256, 100 epochs.
    """

    needs: ClassVar[Budget] = Budget(fraction=1e-9)

    def __init__(self, *, schedule: Schedule) -> None:
        self.schedule = schedule

    def repair(self, network: Normalized, data: DefenderData, runtime: Runtime) -> Normalized:
        clean = data.clean()
        batches = TrainingBatches(
            clean,
            spec=network.spec,
            batch_size=self.schedule.batch_size,
            seed=runtime.derive("finetune"),
            device=runtime.device,
        )
        module = Supervised(network, batches, self.schedule, role="student")
        runtime.fit(module, batches, epochs=self.schedule.epochs)
        return network
