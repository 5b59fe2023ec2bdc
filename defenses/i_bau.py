"""I-BAU: minimax unlearning with an implicit hypergradient (Zeng et al., ICLR 2022, 2110.03735)."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from torch.nn import functional as F

from dhbe.contracts.defense import Defense
from dhbe.core.types import Batch
from dhbe.data import Budget, DefenderData
from dhbe.methods.adversarial import universal
from dhbe.models import Normalized
from dhbe.training.runtime import Runtime
from dhbe.training.schedule import AdamSchedule


class IBAU(Defense):
    """min_theta max_delta CE(f(x + delta), y) with one universal, unclipped delta.

    Per round (epoch): delta by one pass of SGD ascent from zero; then for each batch one Adam step
    on the outer loss, cross-entropy with delta added to a small share of the images, whose gradient
    includes how delta follows theta. The network stays in eval mode.

    Args:
        delta_rate: learning rate of the ascent.
        penalty: weight of ||delta||^2 in it.
        inner_rate: step of the map whose fixed point delta is taken to be.
        fixed_point_steps: K, terms of the hypergradient's series.
        share: of the images that get delta in the outer loss (at least one).
    """

    needs: ClassVar[Budget] = Budget(fraction=1e-9)

    def __init__(
        self,
        *,
        delta_rate: Annotated[float, Gt(0)],
        penalty: Annotated[float, Ge(0)],
        inner_rate: Annotated[float, Gt(0)],
        fixed_point_steps: Annotated[int, Ge(1)],
        share: Annotated[float, Gt(0), Le(1)],
        schedule: AdamSchedule,
    ) -> None:
        self.delta_rate, self.penalty, self.inner_rate = delta_rate, penalty, inner_rate
        self.fixed_point_steps, self.share, self.schedule = fixed_point_steps, share, schedule

    def repair(self, network: Normalized, data: DefenderData, runtime: Runtime) -> Normalized:
        clean, delta = data.clean(), torch.zeros(1)
        batches = runtime.batches(
            clean, spec=network.spec, batch_size=self.schedule.batch_size, purpose="i_bau"
        )

        def loss(net: nn.Module, batch: Batch) -> Tensor:
            x, y = batch.images, batch.labels
            moving = delta.clone().requires_grad_(True)
            inner = self.penalty * moving.square().sum() - F.cross_entropy(net(x + moving), y)
            (gradient,) = torch.autograd.grad(inner, moving, create_graph=True)
            mapped = moving - self.inner_rate * gradient
            count = max(1, int(self.share * len(x)))
            order = torch.randperm(len(x), generator=batch.rng, device=x.device)
            marked = (order < count)[:, None, None, None]
            outer = F.cross_entropy(net(x + marked * moving), y)
            return implicit(outer, mapped, moving, self.fixed_point_steps)

        def perturb(spent: float) -> None:
            nonlocal delta
            batches.set_epoch(round(spent * self.schedule.epochs))
            with runtime.autocast():
                delta = universal(
                    network, batches, learning_rate=self.delta_rate, penalty=self.penalty
                )

        runtime.train(
            network,
            clean,
            self.schedule,
            purpose="i_bau",
            loss=loss,
            train_mode=False,
            before_epoch=perturb,
        )
        return network


def implicit(outer: Tensor, mapped: Tensor, delta: Tensor, steps: int) -> Tensor:
    """Loss () with the gradient of ``outer`` (), delta being the fixed point of ``mapped``.

    With v = sum_{k < steps} (d mapped / d delta)^(T k) d outer / d delta, the gradient is
    d outer / d theta + (d mapped / d theta)^T v (Grazzi et al. 2020). The value means nothing.

    Args:
        outer: scalar of theta and delta.
        mapped: Phi(delta, theta), with a graph.
        delta: leaf that requires a gradient.
    """
    (direct,) = torch.autograd.grad(outer, delta, retain_graph=True)
    v = direct
    for _ in range(steps - 1):
        (carried,) = torch.autograd.grad(mapped, delta, grad_outputs=v, retain_graph=True)
        v = direct + carried
    return outer + (mapped * v.detach()).sum()
