"""AWM: adversarial weight masking (Chai & Chen, NeurIPS 2022, arXiv 2207.04497)."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from dhbe.contracts.defense import Defense
from dhbe.core.errors import ConfigError
from dhbe.core.types import Batch
from dhbe.data import Budget, DefenderData, ImageSet, Resident
from dhbe.methods.adversarial import universal
from dhbe.methods.masks import attach, clamp, fold
from dhbe.models import Normalized
from dhbe.training.runtime import Runtime
from dhbe.training.schedule import AdamSchedule


class AWM(Defense):
    """Soft masks in [0, 1] on every convolution weight, against a universal perturbation.

    Outer loop: (1) a universal delta from zero, one pass of SGD ascent, scaled to ||delta||_1 <=
    ``norm``; (2) one pass of Adam on the masks, alpha CE(x) + (1 - alpha) CE(clip(x + delta)) +
    sparsity ||M||_1. The network stays in eval mode, so BatchNorm keeps its statistics.

    Args:
        alpha: weight of the clean loss (0.99 for one image per class).
        norm: bound tau of the perturbation's l1 norm, in pixels of [0, 1], for 32-pixel images.
        delta_rate: learning rate of the ascent.
        passes: an epoch draws passes * floor(images / batch) batches, with replacement.
        copies: random crops and mirror images added per image (one-shot: 9).
    """

    needs: ClassVar[Budget] = Budget(fraction=1e-9)

    def __init__(
        self,
        *,
        alpha: Annotated[float, Ge(0), Le(1)],
        norm: Annotated[float, Gt(0)],
        sparsity: Annotated[float, Ge(0)],
        delta_rate: Annotated[float, Gt(0)],
        passes: Annotated[int, Ge(1)],
        copies: Annotated[int, Ge(0)],
        schedule: AdamSchedule,
    ) -> None:
        self.alpha, self.norm, self.sparsity = alpha, norm, sparsity
        self.delta_rate, self.passes, self.copies = delta_rate, passes, copies
        self.schedule = schedule

    def repair(self, network: Normalized, data: DefenderData, runtime: Runtime) -> Normalized:
        convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
        if not convolutions:
            raise ConfigError("defense=awm: the network has no convolution; use finetune or ft_sam")
        images = self.enlarged(data.clean(), network, runtime)
        batch_size = min(self.schedule.batch_size, len(images))

        plain = replace(network.spec, augmentation="none")  # the images as they are
        steps = self.passes * max(1, len(images) // batch_size)
        for_delta = runtime.batches(
            images, spec=plain, batch_size=batch_size, purpose="awm/delta", steps=steps
        )
        network.requires_grad_(False)
        scales = attach(convolutions)
        delta = torch.zeros(1)
        bound = self.norm * (network.spec.image_size / 32) ** 2

        def loss(net: nn.Module, batch: Batch) -> Tensor:
            x, y = batch.images, batch.labels
            clean = F.cross_entropy(net(x), y)
            wrong = F.cross_entropy(net((x + delta).clamp(0, 1)), y)
            size = torch.stack([s.mask.abs().sum() for s in scales]).sum()
            return self.alpha * clean + (1 - self.alpha) * wrong + self.sparsity * size

        def perturb(spent: float) -> None:
            nonlocal delta
            for_delta.set_epoch(round(spent * self.schedule.epochs))
            with runtime.autocast():
                found = universal(network, for_delta, learning_rate=self.delta_rate)
            delta = found * (bound / found.abs().sum().clamp_min(1e-12)).clamp_max(1)

        runtime.train(
            network,
            images,
            self.schedule,
            purpose="awm/masks",
            role="masks",
            spec=plain,
            batch_size=batch_size,
            steps=steps,
            loss=loss,
            train_mode=False,
            before_epoch=perturb,
            after_step=lambda: clamp(scales),
        )
        fold(convolutions)
        return network

    def enlarged(self, clean: ImageSet, network: Normalized, runtime: Runtime) -> Resident:
        """The clean images and random crops and mirror images of them."""
        given = clean.resident()
        if not self.copies:
            return given
        size = network.spec.image_size
        steps: list[nn.Module] = [v2.RandomResizedCrop(size, antialias=True)]
        if network.spec.flip:
            steps.append(v2.RandomHorizontalFlip())
        change = v2.Compose(steps)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(runtime.derive("awm copies"))
            more = [change(x) for x in given.images.cpu() for _ in range(self.copies)]
        images = torch.cat([given.images.cpu(), torch.stack(more)])
        return Resident(
            images, torch.cat([given.labels, given.labels.repeat_interleave(self.copies)])
        )
