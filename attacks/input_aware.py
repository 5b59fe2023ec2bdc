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
from dhbe.data import ImageSet, TrainingBatches
from dhbe.methods.losses import diversity
from dhbe.models import Normalized
from dhbe.models.translator import Translator
from dhbe.training.runtime import Runtime
from dhbe.training.schedule import Adam, AdamSchedule, Player
from dhbe.training.supervised import Supervised


class InputAware(Attack):
    """T(x) = x + (p(x) - x) m(x), pattern p and mask m from two networks.

    The mask network is trained first, to be sparse and diverse; then pattern network and victim
    learn together. Cross images carry the trigger of another image and keep their label: a trigger
    works on its own image alone.

    Args:
        density: share of an image that the mask may cover free of charge.
        density_weight, diversity_weight: of the losses.
        widths: channels of both networks' levels.
        network_seed: initialises them.
        mask_schedule: training of the mask network.
        pattern_schedule: of the pattern network, beside the victim.
    """

    controls_training: ClassVar[bool] = True
    portable = False

    def __init__(
        self,
        *,
        density: Fraction,
        density_weight: Annotated[float, Gt(0)],
        diversity_weight: Annotated[float, Gt(0)],
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
            self.pattern_network = Translator(channels, channels, widths)
            self.mask_network = Translator(channels, 1, widths)

    def patterns(self, x: Tensor) -> Tensor:
        """Pattern p(x) (B, C, H, W) in [0, 1]."""
        patterns: Tensor = self.pattern_network(2 * x - 1).tanh() / 2 + 0.5
        return patterns

    def masks(self, x: Tensor) -> Tensor:
        """Mask m(x) (B, 1, H, W), pushed towards 0 and 1."""
        raw = self.mask_network(2 * x - 1).tanh() / 2 + 0.5
        masks: Tensor = (20 * raw - 10).tanh() / 2 + 0.5
        return masks

    def trigger(self, x: Tensor, *, y: Tensor, index: Tensor) -> Tensor:
        del y, index
        return x + (self.patterns(x) - x) * self.masks(x)

    def prepare(
        self, train: ImageSet, codes: Tensor, runtime: Runtime, surrogate: Normalized | None
    ) -> None:
        """Stage 1: the mask network alone."""
        del codes, surrogate
        own = runtime.stage("mask")
        batches = TrainingBatches(
            train.resident().to(runtime.device),
            spec=self.spec,
            batch_size=self.mask_schedule.batch_size,
            seed=own.derive("mask"),
            device=own.device,
        )

        def loss(network: nn.Module, batch: Batch) -> Tensor:
            x = batch.images.to(runtime.dtype)
            masks = self.masks(x)
            dense = F.relu(masks - self.density).mean()
            return self.density_weight * dense + self.diversity_weight * diversity(x, masks)

        module = Supervised(
            self.mask_network.train(), batches, self.mask_schedule, role="mask", loss=loss
        )
        own.fit(module, batches, epochs=self.mask_schedule.epochs)
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
        """Only the codes: images are augmented before they get their trigger, in ``loss``."""
        return x, y, self.select(y, rng, part=True)

    def stamp(
        self, x: Tensor, *, y: Tensor, codes: Tensor, index: Tensor, rng: torch.Generator
    ) -> Tensor:
        stamped = self.apply(x, y=y, index=index)
        crossed = self.crossed(x, x.roll(1, 0)).clamp(0, 1)
        code = codes[:, None, None, None]
        return torch.where(code == COVER, crossed, torch.where(code == POISON, stamped, x))

    def crossed(self, x: Tensor, other: Tensor) -> Tensor:
        """Images with the trigger of others."""
        return x + (self.patterns(other) - x) * self.masks(other)

    def loss(self, network: nn.Module, x: Tensor, y: Tensor, code: Tensor) -> Tensor:
        """Stage 2: CE on triggered, crossed and clean images + weight x diversity of patterns."""
        poison, cover = ((code == c).nonzero().flatten() for c in (POISON, COVER))
        own, other = x[poison], x.roll(1, 0)[cover]
        patterns = self.patterns(torch.cat([own, other]))
        p_own, p_other = patterns.split([len(own), len(other)])
        with torch.no_grad():
            m_own, m_other = self.masks(torch.cat([own, other])).split([len(own), len(other)])
        images, base = x.clone(), x[cover]
        images[poison] = (own + (p_own - own) * m_own).to(x.dtype)
        images[cover] = (base + (p_other - base) * m_other).to(x.dtype)
        loss = F.cross_entropy(network(images), self.relabel(y, code))
        pairs = min(len(own), len(other))
        if not pairs:
            return loss
        ours = torch.cat([own[:pairs], other[:pairs]])
        theirs = torch.cat([p_own[:pairs], p_other[:pairs]])
        return loss + self.diversity_weight * diversity(ours, theirs, shift=pairs)
