"""Fine-pruning: prune what clean images leave asleep, then fine-tune (Liu et al., RAID 2018)."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from dhbe.data import Budget, DefenderData, ImageSet, TrainingBatches, to_float
from dhbe.defense import Defense
from dhbe.models import Normalized
from dhbe.models.dataflow import classifier, penultimate
from dhbe.runtime import Runtime
from dhbe.selection import Selection, choose
from dhbe.training import Schedule, Supervised


class FinePruning(Defense):
    """Prune features in ascending order of their mean activation on clean images, then fine-tune.

    A feature of the last feature map is pruned by zeroing its column of the classifier, which
    equals zeroing its channel, and stays pruned in fine-tuning.

    Args:
        share: of features to prune with ``selection=fixed``; else 0 %, 1 % ... 99 % are tried.
        max_drop: of validation accuracy (a fraction), with ``selection=validation``.
    """

    needs: ClassVar[Budget] = Budget(fraction=1e-9)

    def __init__(
        self,
        *,
        share: Annotated[float, Ge(0), Le(1)],
        selection: Selection,
        max_drop: Annotated[float, Gt(0), Le(1)],
        schedule: Schedule,
    ) -> None:
        self.share, self.selection, self.max_drop = share, selection, max_drop
        self.schedule = schedule

    def repair(self, network: Normalized, data: DefenderData, runtime: Runtime) -> Normalized:
        clean = data.clean(hold_out_validation=self.selection == "validation")
        order = mean_features(network, clean, runtime).argsort()

        def cut(net: Normalized, share: float) -> None:
            classifier(net).weight.data[:, order[: round(share * len(order))]] = 0

        share, network = choose(
            network,
            [i / 100 for i in range(100)],
            cut,
            fixed=self.share,
            selection=self.selection,
            max_drop=self.max_drop,
            data=data,
            runtime=runtime,
        )
        runtime.recorder.notes.append(f"fine_pruning pruned {share:.0%} of {len(order)} features")
        batches = TrainingBatches(
            clean,
            spec=network.spec,
            batch_size=self.schedule.batch_size,
            seed=runtime.derive("fine_pruning"),
            device=runtime.device,
        )
        module = Supervised(
            network,
            batches,
            self.schedule,
            role="student",
            after_step=lambda: cut(network, share),
        )
        runtime.fit(module, batches, epochs=self.schedule.epochs)
        return network


@torch.no_grad()
def mean_features(network: Normalized, images: ImageSet, runtime: Runtime) -> Tensor:
    """Mean absolute activation (F,) of the features before the classifier."""
    parts = []
    for raw, _ in images.batches(torch.arange(len(images)), 500):
        x = to_float(raw.to(runtime.device)).to(runtime.dtype)
        parts.append(penultimate(network, x)[0].abs())
    return torch.cat(parts).mean(dim=0)
