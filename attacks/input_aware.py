"""Input-aware: a generator draws each image its own trigger (Nguyen & Tran, NeurIPS 2020)."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Len
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Unpack

from dhbe.contracts.attack import Attack, Fraction, Poisoning
from dhbe.core.rng import fork
from dhbe.core.types import COVER, POISON, Batch
from dhbe.data import ImageSet
from dhbe.methods.losses import diversity
from dhbe.models import Normalized
from dhbe.models.translator import Translator
from dhbe.training.runtime import Runtime
from dhbe.training.schedule import Adam, AdamSchedule, Player


class InputAware(Attack):
    """T(x) = x + (p(x) - x) m(x), pattern p and mask m from two networks.

    The mask network is trained first, to be sparse and diverse; then pattern network and victim
    learn together. Cross images carry the trigger of another image and keep their label: a trigger
    works on its own image alone.

    Args:
        density: share of an image that the mask may cover free of charge.
        density_weight, diversity_weight: of the losses.
        normalized: measure how images differ in units of the data's deviation.
        widths, network_seed: channels of both networks' levels, and what initialises them.
        mask_schedule: training of the mask network.
        pattern_schedule: of the pattern network, beside the victim.
    """

    controls_training: ClassVar[bool] = True
    portable = False
    unit: Tensor

    def __init__(
        self,
        *,
        density: Fraction,
        density_weight: Annotated[float, Gt(0)],
        diversity_weight: Annotated[float, Gt(0)],
        normalized: bool,
        widths: Annotated[list[Annotated[int, Ge(1)]], Len(1)],
        network_seed: Annotated[int, Ge(0)],
        mask_schedule: AdamSchedule,
        pattern_schedule: Adam,
        **options: Unpack[Poisoning],
    ) -> None:
        super().__init__(**options)
        self.density = density
        self.density_weight, self.diversity_weight = density_weight, diversity_weight
        self.mask_schedule, self.pattern_schedule = mask_schedule, pattern_schedule
        channels = self.spec.channels
        with fork(network_seed):
            self.pattern_network = Translator(channels, channels, widths, normalized=True)
            self.mask_network = Translator(channels, 1, widths, normalized=True)
        std = torch.tensor(self.spec.std if normalized else (1.0,) * channels)
        self.register_buffer("unit", std[:, None, None], persistent=False)

    def patterns(self, x: Tensor) -> Tensor:
        """Pattern p(x) (B, C, H, W) in [0, 1] for images of the same shape and range."""
        patterns: Tensor = self.pattern_network(2 * x - 1).tanh() / 2 + 0.5
        return patterns

    def masks(self, x: Tensor) -> Tensor:
        """Mask m(x) (B, 1, H, W) in [0, 1], steep at 0.5, for images (B, C, H, W) in [0, 1]."""
        raw = self.mask_network(2 * x - 1).tanh() / 2 + 0.5
        masks: Tensor = (20 * raw - 10).tanh() / 2 + 0.5
        return masks

    def inject(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) with the triggers of ``source`` (same shape), and their patterns."""
        patterns = self.patterns(source)
        with torch.no_grad():  # fixed since stage 1
            masks = self.masks(source)
        return x + (patterns - x) * masks, patterns

    def trigger(self, x: Tensor) -> Tensor:
        return self.inject(x, x)[0]

    def prepare(
        self, train: ImageSet, indicator: Tensor, runtime: Runtime, surrogate: Normalized | None
    ) -> None:
        """Stage 1: the mask network alone; ``indicator`` (N,) is not used."""
        del indicator, surrogate

        def loss(network: nn.Module, batch: Batch) -> Tensor:
            masks = self.masks(batch.images)
            dense = F.relu(masks - self.density).mean()
            alike = diversity(batch.images / self.unit, masks)
            return self.density_weight * dense + self.diversity_weight * alike

        runtime.stage("mask").train(
            self.mask_network.train(),
            train.resident(),
            self.mask_schedule,
            purpose="mask",
            role="mask",
            spec=self.spec,
            loss=loss,
        )
        self.mask_network.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> InputAware:
        """The mask network stays as stage 1 left it."""
        super().train(mode)
        self.mask_network.eval()
        return self

    def players(self) -> list[Player]:
        return [Player(network=self.pattern_network, schedule=self.pattern_schedule)]

    @torch.no_grad()
    def compose(
        self, x: Tensor, y: Tensor, index: Tensor, rng: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images, labels, poison indicator (B,): ``loss`` puts the trigger on augmented images."""
        return x, y, self.select(y, rng, part=True)

    def training_images(
        self, x: Tensor, *, y: Tensor, indicator: Tensor, index: Tensor, rng: torch.Generator
    ) -> Tensor:
        triggered = self.apply(x, y=y, index=index)
        crossed = self.inject(x, x.roll(1, 0))[0].clamp(0, 1)
        kind = indicator[:, None, None, None]
        return torch.where(kind == COVER, crossed, torch.where(kind == POISON, triggered, x))

    def loss(self, network: nn.Module, x: Tensor, y: Tensor, indicator: Tensor) -> Tensor:
        """Stage 2, loss (): CE on triggered, crossed, clean images + weight x pattern diversity."""
        poison, cover = ((indicator == c).nonzero().flatten() for c in (POISON, COVER))
        base = torch.cat([x[poison], x[cover]])
        source = torch.cat([x[poison], x.roll(1, 0)[cover]])
        injected, patterns = self.inject(base, source)
        images = x.clone()
        images[torch.cat([poison, cover])] = injected.to(x.dtype)
        loss = F.cross_entropy(network(images), self.relabel(y, indicator))
        pairs = min(len(poison), len(cover))
        if not pairs:
            return loss
        both = [*range(pairs), *range(len(poison), len(poison) + pairs)]
        seen, drawn = (t[both] / self.unit for t in (source, patterns))
        return loss + self.diversity_weight * diversity(seen, drawn, shift=pairs)
