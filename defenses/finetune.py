"""Fine-tuning on a few clean images: cross-entropy, all parameters (BackdoorBench's ``ft``)."""

from __future__ import annotations

from typing import ClassVar

from dhbe.contracts.defense import Defense
from dhbe.data import Budget, DefenderData
from dhbe.models import Normalized
from dhbe.training.runtime import Runtime
from dhbe.training.schedule import Schedule


class FineTune(Defense):
    """Train on the granted clean images, augmented as the data set allows, in train mode.

    Args:
        schedule: SGD and its learning rate; BackdoorBench: 0.01 cosine, batch 256, 100 epochs.
    """

    needs: ClassVar[Budget] = Budget(fraction=1e-9)

    def __init__(self, *, schedule: Schedule) -> None:
        self.schedule = schedule

    def repair(self, network: Normalized, data: DefenderData, runtime: Runtime) -> Normalized:
        runtime.train(network, data.clean(), self.schedule, purpose="finetune")
        return network
