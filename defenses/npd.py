"""NPD: a linear layer that filters triggers out of features (Zhu et al., NeurIPS 2023, 2306.16697).

Official code: BackdoorBench's ``defense/npd.py`` with ``model_name: convbn``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from torch.nn import functional as F

from dhbe.contracts.defense import Defense
from dhbe.core.types import Batch
from dhbe.data import Budget, DefenderData
from dhbe.methods.losses import denial
from dhbe.models import Normalized
from dhbe.models.polarizer import Polarizer, place
from dhbe.training.runtime import Runtime
from dhbe.training.schedule import Schedule


class NPD(Defense):
    """Insert a polarizer, a 1x1 convolution and BatchNorm, before a convolution; train it alone.

    1. ``warm_schedule`` of clean cross-entropy, in which the polarizer's BatchNorm learns its
       statistics; they stay from then on, as those of the network always do.
    2. ``schedule``: each image x with label y is moved towards the class that the network finds
       the most probable but for y, by ``pgd_steps`` inside an l2 ball, clipped to [0, 1]. The loss
       is ``clean`` CE(x, y) + ``kept`` CE(x', answer to x) + ``wrong`` -log(1 - p_j(x')), j the
       most probable wrong class there, + ``target`` -log(1 - p_t(x')), t the class moved to.

    The trained polarizer is linear and is folded into the convolution behind it, so the purified
    network has the suspect's architecture. Its border of zeros is mapped, too (officially it is
    added behind the polarizer). Images are not augmented.

    Args:
        epsilon: radius of the ball, on pixels in [0, 1].
        step_size: of sign steps, in units of pixels in [0, 1].
        enough: share of moved images at which no more steps are made.
        clean, kept, wrong, target: weights of the loss.
    """

    needs: ClassVar[Budget] = Budget(fraction=1e-9)

    def __init__(
        self,
        *,
        epsilon: Annotated[float, Gt(0)],
        step_size: Annotated[float, Gt(0)],
        pgd_steps: Annotated[int, Ge(1)],
        enough: Annotated[float, Ge(0), Le(1)],
        clean: Annotated[float, Ge(0)],
        kept: Annotated[float, Ge(0)],
        wrong: Annotated[float, Ge(0)],
        target: Annotated[float, Ge(0)],
        warm_schedule: Schedule,
        schedule: Schedule,
    ) -> None:
        self.epsilon, self.step_size = epsilon, step_size
        self.pgd_steps, self.enough = pgd_steps, enough
        self.clean, self.kept, self.wrong, self.target = clean, kept, wrong, target
        self.warm_schedule, self.schedule = warm_schedule, schedule

    def repair(self, network: Normalized, data: DefenderData, runtime: Runtime) -> Normalized:
        clean, plain = data.clean(), replace(network.spec, augmentation="none")
        network.requires_grad_(False)
        polarizer = Polarizer(*place(network)).to(runtime.device, runtime.dtype)

        def warm(_: nn.Module, batch: Batch) -> Tensor:
            return F.cross_entropy(network(batch.images), batch.labels)

        def loss(_: nn.Module, batch: Batch) -> Tensor:
            x, y = batch.images, batch.labels
            with torch.no_grad():
                answer = network(x)
            target = others(answer, y).argmax(1)
            moved = self.moved(network, x, target)
            logits, of_moved = network(torch.cat([x, moved])).chunk(2)
            return (
                self.clean * F.cross_entropy(logits, y)
                + self.kept * F.cross_entropy(of_moved, answer.argmax(1))
                + self.wrong * denial(of_moved, others(of_moved, y).argmax(1)).mean()
                + self.target * denial(of_moved, target).mean()
            )

        with polarizer.inserted():
            runtime.stage("warm").train(
                polarizer, clean, self.warm_schedule, purpose="npd/warm", spec=plain, loss=warm
            )
            runtime.stage("polarize").train(
                polarizer,
                clean,
                self.schedule,
                purpose="npd",
                spec=plain,
                loss=loss,
                train_mode=False,
            )
        polarizer.fold()
        return network

    def moved(self, network: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        """Images (B, C, H, W) moved from x towards the classes ``target`` (B,)."""
        delta = torch.zeros_like(x)
        for step in range(self.pgd_steps):
            delta.requires_grad_(True)
            logits = network((x + delta).clamp(0, 1))
            if step and float((logits.argmax(1) == target).float().mean()) > self.enough:
                break
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits, target), delta)
            delta = delta.detach() - self.step_size * gradient.sign()
            delta = delta.renorm(2, 0, self.epsilon)
        return (x + delta.detach()).clamp(0, 1)


def others(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits (B, K) without those of ``labels`` (B,), which become -inf."""
    return logits.scatter(1, labels[:, None], -torch.inf)
