"""Fine-pruning: prune channels dormant on clean images, then fine-tune (Liu et al., RAID 2018)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le

from dhbe.contracts.defense import Defense
from dhbe.data import Budget, DefenderData, ImageSet
from dhbe.methods.selection import Selection, choose
from dhbe.models import Normalized
from dhbe.models.dataflow import classifier, features
from dhbe.training.runtime import Runtime
from dhbe.training.schedule import Schedule


class FinePruning(Defense):
    """Prune features in ascending order of their mean activation on clean images, then fine-tune.

    A feature of the last feature map is pruned by zeroing its column of the classifier, which
    equals zeroing its channel, and stays pruned in fine-tuning.

    Args:
        ranking: by the mean (BackdoorBench) or by the mean absolute value; the same for features
            behind a ReLU, not for pre-activation networks without a last BatchNorm.
        share: of features to prune with ``selection=fixed``; else 0 %, 1 % ... 99 % are tried.
        max_drop: share of the validation accuracy that may be lost, with ``selection=validation``.
    """

    needs: ClassVar[Budget] = Budget(fraction=1e-9)

    def __init__(
        self,
        *,
        ranking: Literal["signed", "absolute"],
        share: Annotated[float, Ge(0), Le(1)],
        selection: Selection,
        max_drop: Annotated[float, Gt(0), Le(1)],
        schedule: Schedule,
    ) -> None:
        self.ranking, self.share, self.selection = ranking, share, selection
        self.max_drop, self.schedule = max_drop, schedule

    def repair(self, network: Normalized, data: DefenderData, runtime: Runtime) -> Normalized:
        validated = self.selection == "validation"
        clean = data.clean(hold_out_validation=validated)
        seen = runtime.forward(network, clean, features)
        order = (seen.abs() if self.ranking == "absolute" else seen).mean(dim=0).argsort()

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
            relative=True,
            measure=head_accuracy(network, data.validation(), runtime) if validated else None,
        )
        runtime.recorder.notes.append(f"fine_pruning pruned {share:.0%} of {len(order)} features")
        runtime.train(
            network,
            clean,
            self.schedule,
            purpose="fine_pruning",
            after_step=lambda: cut(network, share),
        )
        return network


def head_accuracy(
    network: Normalized, images: ImageSet, runtime: Runtime
) -> Callable[[Normalized], float]:
    """Function that gives the accuracy of networks that differ in the classifier alone."""
    seen, labels = runtime.forward(network, images, features), runtime.labels(images)

    @torch.no_grad()
    def measure(net: Normalized) -> float:
        return int((classifier(net)(seen).argmax(1) == labels).sum()) / len(labels)

    return measure
