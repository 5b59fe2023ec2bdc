"""PBE and AFT: progressive backdoor erasing by adversarial fine-tuning (Mu et al., CVPR 2023)."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from torch.nn import functional as F

from dhbe.contracts.defense import Defense
from dhbe.core.types import Augmentation, Batch
from dhbe.data import Budget, DefenderData, ImageSet, Resident
from dhbe.methods.adversarial import pgd
from dhbe.models import Normalized
from dhbe.training.runtime import Runtime
from dhbe.training.schedule import Schedule


class AFT(Defense):
    """Adversarial fine-tuning on clean images (arXiv 2202.06312).

    The first epochs learn the true labels of untargeted PGD images, which act like triggered ones
    on a backdoored network; the others learn the clean images.

    Args:
        epsilon, step_size: of PGD, in levels of 255 (published: 6 and a fifth of it).
        pgd_steps: of PGD, against the network in eval mode.
        adversarial_epochs: how many epochs come first.
        augmentation: of all trainings.
    """

    needs: ClassVar[Budget] = Budget(fraction=1e-9)

    def __init__(
        self,
        *,
        epsilon: Annotated[float, Gt(0)],
        step_size: Annotated[float, Gt(0)],
        pgd_steps: Annotated[int, Ge(1)],
        adversarial_epochs: Annotated[int, Ge(0)],
        augmentation: Augmentation,
        schedule: Schedule,
    ) -> None:
        self.epsilon, self.step_size, self.pgd_steps = epsilon / 255, step_size / 255, pgd_steps
        self.adversarial_epochs, self.schedule = adversarial_epochs, schedule
        self.augmentation = augmentation

    def repair(self, network: Normalized, data: DefenderData, runtime: Runtime) -> Normalized:
        self.tune(network, data.clean(), runtime, adversarial=self.adversarial_epochs)
        return network

    def tune(
        self,
        network: Normalized,
        images: ImageSet,
        runtime: Runtime,
        *,
        adversarial: float,
        turn: int = 0,
    ) -> None:
        """The schedule on ``images``, its first epochs ``adversarial``; in place."""

        def loss(net: nn.Module, batch: Batch) -> Tensor:
            x, y = batch.images, batch.labels
            if batch.progress <= adversarial:
                net.eval()
                x = pgd(
                    net,
                    x,
                    y,
                    epsilon=self.epsilon,
                    step_size=self.step_size,
                    steps=self.pgd_steps,
                    clip=False,
                )
                net.train()
            return F.cross_entropy(net(x), y)

        spec = replace(network.spec, augmentation=self.augmentation)
        runtime.train(network, images, self.schedule, purpose=f"aft/{turn}", spec=spec, loss=loss)
        network.eval()


class PBE(AFT):
    """No clean images: purify network and training set in turns (arXiv 2202.06312).

    The pool starts as a random ``first_share`` of the poisoned training set. After each round of
    fine-tuning all training images are ranked by the cosine of the suspect's and the current
    network's logits; those that kept their answer are clean. The next round uses the top
    ``shares[r]``. The first round is all adversarial, later ones in their first batches.

    Args:
        adversarial_batches: of each round after the first.
        shares: one per round after the first.
    """

    needs: ClassVar[Budget] = Budget(poisoned=True)

    def __init__(
        self,
        *,
        epsilon: Annotated[float, Gt(0)],
        step_size: Annotated[float, Gt(0)],
        pgd_steps: Annotated[int, Ge(1)],
        adversarial_batches: Annotated[int, Ge(0)],
        first_share: Annotated[float, Gt(0), Le(1)],
        shares: list[Annotated[float, Gt(0), Le(1)]],
        augmentation: Augmentation,
        schedule: Schedule,
    ) -> None:
        super().__init__(
            epsilon=epsilon,
            step_size=step_size,
            pgd_steps=pgd_steps,
            adversarial_epochs=schedule.epochs,
            augmentation=augmentation,
            schedule=schedule,
        )
        self.adversarial_batches = adversarial_batches
        self.first_share, self.shares = first_share, shares

    def repair(self, network: Normalized, data: DefenderData, runtime: Runtime) -> Normalized:
        given = data.poisoned()
        before = answers(network, given, runtime)
        order = torch.randperm(len(given), generator=runtime.rng("pbe pool"))
        pool = given.subset(order[: round(self.first_share * len(given))])
        for turn in range(len(self.shares) + 1):
            adversarial = float(self.adversarial_epochs)
            if turn:
                adversarial = self.adversarial_batches / max(
                    1, len(pool) // self.schedule.batch_size
                )
            own = runtime.stage(f"round{turn}")
            self.tune(network, pool, own, adversarial=adversarial, turn=turn)
            if turn < len(self.shares):
                likeness = F.cosine_similarity(before, answers(network, given, runtime))
                best = likeness.argsort(descending=True)
                pool = given.subset(best[: round(self.shares[turn] * len(given))])
        return network


def answers(network: Normalized, images: Resident, runtime: Runtime) -> Tensor:
    """Logits (N, classes) of all images, in eval mode and in the precision of trainings."""
    with runtime.autocast():
        return runtime.forward(network, images)
