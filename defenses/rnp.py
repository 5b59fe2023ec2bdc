"""RNP: reconstructive neuron pruning (Li et al., ICML 2023, arXiv 2305.14876)."""

from __future__ import annotations

import copy
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from torch.nn import functional as F

from dhbe.contracts.defense import Defense
from dhbe.core.types import Batch
from dhbe.data import Budget, DefenderData, even
from dhbe.methods.masks import attach, batch_norms, clamp
from dhbe.methods.selection import Selection, prune_by_masks
from dhbe.methods.unlearning import unlearn
from dhbe.models import Normalized
from dhbe.training.runtime import Runtime
from dhbe.training.schedule import Schedule


class RNP(Defense):
    """Unlearn the clean task, recover it by filter masks, prune what the recovery wants gone.

    1. Ascend the clean cross-entropy until accuracy falls to ``stop_accuracy``.
    2. With these weights frozen, masks m in [0, 1] on BatchNorm's gamma descend alpha CE.
    3. In the original network gamma = 0 for all channels with m at or below a threshold.

    Args:
        unlearn_schedule, recover_schedule: of steps 1 and 2.
        clip: bound of the gradient's norm in step 1.
        alpha: factor on the loss of step 2.
        threshold: used with ``selection=fixed`` (BackdoorBench 0.7); else 0, 0.05 ... 0.9.
        max_drop: of validation accuracy (a fraction), with ``selection=validation``.
    """

    needs: ClassVar[Budget] = Budget(fraction=1e-9)

    def __init__(
        self,
        *,
        stop_accuracy: Annotated[float, Ge(0), Le(1)],
        clip: Annotated[float, Gt(0)],
        alpha: Annotated[float, Gt(0)],
        threshold: Annotated[float, Ge(0), Le(1)],
        selection: Selection,
        max_drop: Annotated[float, Ge(0), Le(1)],
        unlearn_schedule: Schedule,
        recover_schedule: Schedule,
    ) -> None:
        self.stop_accuracy, self.clip, self.alpha = stop_accuracy, clip, alpha
        self.threshold, self.selection, self.max_drop = threshold, selection, max_drop
        self.unlearn_schedule, self.recover_schedule = unlearn_schedule, recover_schedule

    def repair(self, network: Normalized, data: DefenderData, runtime: Runtime) -> Normalized:
        clean = data.clean(hold_out_validation=self.selection == "validation")
        forgetful = copy.deepcopy(network)
        unlearn(
            forgetful,
            clean,
            self.unlearn_schedule,
            runtime,
            stop_accuracy=self.stop_accuracy,
            clip=self.clip,
        )
        forgetful.requires_grad_(False)
        scales = attach(batch_norms(forgetful, method="rnp"))

        def loss(net: nn.Module, batch: Batch) -> Tensor:
            logits = net(batch.images)
            return self.alpha * F.cross_entropy(logits, batch.labels)

        runtime.stage("recover").train(
            forgetful,
            clean,
            self.recover_schedule,
            purpose="rnp",
            role="masks",
            batch_size=even(len(clean), self.recover_schedule.batch_size),
            loss=loss,
            after_step=lambda: clamp(scales),
        )
        masks = [s.mask.detach() for s in scales]
        return prune_by_masks(
            network,
            masks,
            method="rnp",
            fixed=self.threshold,
            selection=self.selection,
            max_drop=self.max_drop,
            data=data,
            runtime=runtime,
        )
