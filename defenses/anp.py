"""ANP: adversarial neuron pruning (Wu & Wang, NeurIPS 2021, arXiv 2110.14430)."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from torch.nn import functional as F

from dhbe.contracts.defense import Defense
from dhbe.core.types import Batch
from dhbe.data import Budget, DefenderData
from dhbe.methods.masks import Scale, attach, batch_norms, clamp, fold
from dhbe.methods.selection import Selection, prune_by_masks
from dhbe.models import Normalized
from dhbe.models.hooks import frozen_statistics
from dhbe.training.runtime import Runtime
from dhbe.training.schedule import Schedule


class ANP(Defense):
    """Prune the BatchNorm channels whose masks fall when neurons are disturbed.

    gamma (m + d) and beta (1 + e): per batch, noises d, e start uniformly in [-eps, eps] and climb
    the cross-entropy by sign steps; masks m in [0, 1] descend alpha CE(clean) + (1 - alpha)
    CE(disturbed). Then gamma = 0 for all channels with m at or below a threshold.

    Args:
        epsilon: bound of the noise's start, and the length of all its steps together.
        bounded: whether the climb, too, stays in [-eps, eps] (the paper's formula); official code
            lets it reach 2 eps.
        alpha: weight of the undisturbed loss.
        noise_steps: sign steps of epsilon / noise_steps.
        steps: batches per epoch, drawn with replacement.
        threshold: used with ``selection=fixed``; else thresholds 0, 0.05 ... 0.9 are tried.
        max_drop: of validation accuracy (a fraction), with ``selection=validation``.
    """

    needs: ClassVar[Budget] = Budget(fraction=1e-9)

    def __init__(
        self,
        *,
        epsilon: Annotated[float, Gt(0)],
        bounded: bool,
        alpha: Annotated[float, Ge(0), Le(1)],
        noise_steps: Annotated[int, Ge(1)],
        steps: Annotated[int, Ge(1)],
        threshold: Annotated[float, Ge(0), Le(1)],
        selection: Selection,
        max_drop: Annotated[float, Ge(0), Le(1)],
        schedule: Schedule,
    ) -> None:
        self.epsilon, self.bounded, self.alpha = epsilon, bounded, alpha
        self.noise_steps = noise_steps
        self.steps, self.threshold, self.selection = steps, threshold, selection
        self.max_drop, self.schedule = max_drop, schedule

    def repair(self, network: Normalized, data: DefenderData, runtime: Runtime) -> Normalized:
        masks = self.learn_masks(network, data, runtime)
        return prune_by_masks(
            network,
            masks,
            method="anp",
            fixed=self.threshold,
            selection=self.selection,
            max_drop=self.max_drop,
            data=data,
            runtime=runtime,
        )

    def learn_masks(
        self, network: Normalized, data: DefenderData, runtime: Runtime
    ) -> list[Tensor]:
        """Masks (C,) in [0, 1] of all BatchNorms' weights; the network is left as it was."""
        before = {k: v.clone() for k, v in network.state_dict().items()}
        layers = batch_norms(network, method="anp")
        network.requires_grad_(False)
        weights, biases = attach(layers), attach(layers, "bias")
        for scale in biases:
            scale.mask.requires_grad_(False)
        scales = [*weights, *biases]

        def loss(net: nn.Module, batch: Batch) -> Tensor:
            x, y = batch.images, batch.labels
            self.disturb(net, scales, x, y, batch.rng)
            noisy = F.cross_entropy(frozen_statistics(net, x), y)
            calm(scales)
            return self.alpha * F.cross_entropy(net(x), y) + (1 - self.alpha) * noisy

        runtime.train(
            network,
            data.clean(hold_out_validation=self.selection == "validation"),
            self.schedule,
            purpose="anp",
            role="masks",
            steps=self.steps,
            loss=loss,
            after_step=lambda: clamp(weights),
        )
        masks = [s.mask.detach().clone() for s in weights]
        fold(layers, keep=False)
        fold(layers, "bias", keep=False)
        network.load_state_dict(before)
        network.eval().requires_grad_(True)
        return masks

    def disturb(
        self, net: nn.Module, scales: list[Scale], x: Tensor, y: Tensor, rng: torch.Generator
    ) -> None:
        """Set all noises: uniform in [-eps, eps], then sign ascent on CE of x (B, C, H, W)."""
        for scale in scales:
            drawn = torch.rand(scale.noise.shape, generator=rng, device=rng.device)
            scale.noise = self.epsilon * (2 * drawn.to(scale.noise.dtype) - 1)
        for _ in range(self.noise_steps):
            for scale in scales:
                scale.noise = scale.noise.detach().requires_grad_(True)
            noises = [s.noise for s in scales]
            gradients = torch.autograd.grad(F.cross_entropy(frozen_statistics(net, x), y), noises)
            for scale, gradient in zip(scales, gradients, strict=True):
                moved = scale.noise.detach() + self.epsilon / self.noise_steps * gradient.sign()
                if self.bounded:
                    moved = moved.clamp(-self.epsilon, self.epsilon)
                scale.noise = moved
            torch.clear_autocast_cache()


def calm(scales: list[Scale]) -> None:
    """Take all noises away."""
    for scale in scales:
        scale.noise = torch.zeros_like(scale.noise)
