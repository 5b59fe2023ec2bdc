"""SAU: shared adversarial unlearning (Wei et al., NeurIPS 2023, arXiv 2307.10562)."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn
from torch.nn import functional as F

from dhbe.contracts.defense import Defense
from dhbe.core.types import Batch
from dhbe.data import Budget, DefenderData
from dhbe.methods.losses import denial
from dhbe.models import Normalized
from dhbe.training.runtime import Runtime
from dhbe.training.schedule import AdamSchedule


class SAU(Defense):
    """Seek images that fool suspect and student alike; let the student disagree with the suspect.

    Per batch: images x + d that both networks take for one wrong class, by PGD from d = epsilon;
    then a step on clean CE + ``robust`` CE(x + d, y) + ``shared`` mean of -log(1 - p_k(x + d)) over
    the images that fool the suspect, k its answer. BatchNorm keeps its statistics, x + d is not
    clipped, images are not augmented.

    Args:
        epsilon, step_size: of l-infinity PGD, in units of pixels in [0, 1].
        pgd_steps: at most so many, until all images are shared adversarial ones.
        adversarial, agreement: weights in PGD of -CE and of the Jensen-Shannon divergence.
        clean, robust, shared: weights of the three terms above.
    """

    needs: ClassVar[Budget] = Budget(fraction=1e-9)

    def __init__(
        self,
        *,
        epsilon: Annotated[float, Gt(0)],
        step_size: Annotated[float, Gt(0)],
        pgd_steps: Annotated[int, Ge(1)],
        adversarial: Annotated[float, Ge(0)],
        agreement: Annotated[float, Ge(0)],
        clean: Annotated[float, Ge(0)],
        robust: Annotated[float, Ge(0)],
        shared: Annotated[float, Ge(0)],
        schedule: AdamSchedule,
    ) -> None:
        self.epsilon, self.step_size, self.pgd_steps = epsilon, step_size, pgd_steps
        self.adversarial, self.agreement = adversarial, agreement
        self.clean, self.robust, self.shared = clean, robust, shared
        self.schedule = schedule

    def repair(self, network: Normalized, data: DefenderData, runtime: Runtime) -> Normalized:
        suspect = copy.deepcopy(network).requires_grad_(False)

        def loss(net: nn.Module, batch: Batch) -> Tensor:
            x, y = batch.images, batch.labels
            with torch.no_grad():
                own, before = net(x).argmax(1), suspect(x).argmax(1)
            moved = x + self.perturbation(net, suspect, x, y, own, before)
            with torch.no_grad():
                answer = suspect(moved).argmax(1)
            logits, of_moved = net(torch.cat([x, moved])).chunk(2)
            fooled = (answer != y) & (answer != before)
            total: Tensor = (
                self.clean * F.cross_entropy(logits, y)
                + self.robust * F.cross_entropy(of_moved, y)
                + self.shared * (denial(of_moved, answer) * fooled).mean()
            )
            return total

        runtime.train(
            network,
            data.clean(),
            self.schedule,
            purpose="sau",
            spec=replace(network.spec, augmentation="none"),
            loss=loss,
            train_mode=False,
        )
        return network

    def perturbation(
        self,
        net: nn.Module,
        suspect: nn.Module,
        x: Tensor,
        y: Tensor,
        own: Tensor,
        before: Tensor,
    ) -> Tensor:
        """Step d (B, C, H, W) from x, with labels y and the two networks' answers to x, (B,)."""
        delta = torch.full_like(x, self.epsilon)
        for _ in range(self.pgd_steps):
            delta.requires_grad_(True)
            a, b = net(x + delta), suspect(x + delta)
            fools, fools_suspect = a.argmax(1) != own, b.argmax(1) != before
            both = fools & fools_suspect & (a.argmax(1) == b.argmax(1))
            if bool(both.all()):
                break
            right = F.cross_entropy(a, y, reduction="none") * ~fools
            right = right + F.cross_entropy(b, y, reduction="none") * ~fools_suspect
            apart = jensen_shannon(a, b) * ~both
            target = self.agreement * apart.mean() - self.adversarial * right.mean() / 2
            (gradient,) = torch.autograd.grad(target, delta)
            delta = (delta.detach() - self.step_size * gradient.sign()).clamp(
                -self.epsilon, self.epsilon
            )
        return delta.detach()


def jensen_shannon(a: Tensor, b: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats (B,) of the predictions by logits a and b, (B, K)."""
    p, q = a.log_softmax(1), b.log_softmax(1)
    mean = torch.logaddexp(p, q) - math.log(2)
    return 0.5 * (p.exp() * (p - mean) + q.exp() * (q - mean)).sum(1)
