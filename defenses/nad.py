"""NAD: neural attention distillation (Li et al., ICLR 2021, arXiv 2101.05930)."""

from __future__ import annotations

import copy
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Len
from torch import Tensor, nn
from torch.nn import functional as F

from dhbe.contracts.defense import Defense
from dhbe.core.errors import ConfigError
from dhbe.core.types import Batch
from dhbe.data import Budget, DefenderData
from dhbe.models import Normalized
from dhbe.models.hooks import capture, stages
from dhbe.training.runtime import Runtime
from dhbe.training.schedule import Schedule


class NAD(Defense):
    """A fine-tuned copy teaches the suspect where to look.

    L = CE + sum_l beta_l MSE(A(F_S^l) / ||A||_2, A(F_T^l) / ||A||_2), A = sum_c |F_c|^p, over the
    last stages; the teacher is the suspect after fine-tuning on the same images.

    Args:
        betas: weights of the stages, the last ones, from fine to coarse.
        power: p.
        teacher_schedule, schedule: of teacher and student.
    """

    needs: ClassVar[Budget] = Budget(fraction=1e-9)

    def __init__(
        self,
        *,
        betas: Annotated[list[Annotated[float, Ge(0)]], Len(1)],
        power: Annotated[float, Gt(0)],
        teacher_schedule: Schedule,
        schedule: Schedule,
    ) -> None:
        self.betas, self.power = betas, power
        self.teacher_schedule, self.schedule = teacher_schedule, schedule

    def repair(self, network: Normalized, data: DefenderData, runtime: Runtime) -> Normalized:
        clean = data.clean()

        found = len(stages(network, network.probe()))
        if found < len(self.betas):
            raise ConfigError(
                f"defense=nad: defense.betas={self.betas} names {len(self.betas)} stages, but the "
                f"network has feature maps at {found} resolutions; use fewer, or finetune"
            )
        teacher = copy.deepcopy(network)
        runtime.stage("teacher").train(
            teacher, clean, self.teacher_schedule, purpose="nad/teacher", role="teacher"
        )
        teacher.eval().requires_grad_(False)
        looks = [stages(n.eval(), n.probe())[-len(self.betas) :] for n in (network, teacher)]

        def loss(net: nn.Module, batch: Batch) -> Tensor:
            x = batch.images
            with capture(looks[1]) as theirs, torch.no_grad():
                teacher(x)
            with capture(looks[0]) as ours:
                total = F.cross_entropy(net(x), batch.labels)
            for beta, a, b in zip(self.betas, ours, theirs, strict=True):
                total = total + beta * F.mse_loss(
                    attention(a, self.power), attention(b, self.power)
                )
            return total

        runtime.train(network, clean, self.schedule, purpose="nad/student", loss=loss)
        return network


def attention(features: Tensor, power: float) -> Tensor:
    """Features (B, C, H, W) -> sum over C of abs(F) ** power, (B, H, W) of unit l2 norm."""
    maps: Tensor = features.float().abs().pow(power).sum(dim=1)
    lengths: Tensor = maps.flatten(1).norm(dim=1).clamp_min(1e-12)
    return maps / lengths[:, None, None]
