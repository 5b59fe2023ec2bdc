"""LIRA: trigger generator and victim learn from each other (Doan et al., ICCV 2021)."""

from __future__ import annotations

import copy
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Len
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Unpack

from dhbe.contracts.attack import Attack, Fraction, Poisoning
from dhbe.core.rng import fork
from dhbe.methods.patterns import frozen_call
from dhbe.models.translator import Translator
from dhbe.training.schedule import Adam, Player


class LIRA(Attack):
    """T(x) = clip(x + epsilon tanh(g(x))).

    Stage 1: a copy g' of the generator follows CE(f(x + epsilon tanh g'(x)), goal), while f learns
    from clean and triggered images, alpha CE(f(x), y) + (1 - alpha) CE(f(T(x)), goal); g becomes g'
    after each epoch. Both moves start from the same f and g, so one backward pass serves them.
    Stage 2: g is frozen, f goes on. All samples take part in both forms, whatever ``poison_rate``;
    clean and triggered ones pass the network separately, each with BatchNorm statistics of its own.

    Args:
        epsilon: of stage 1, in levels of 255.
        final_epsilon: of stage 2 and of evaluation.
        alpha: weight of the clean loss.
        generator_share: part of the victim's budget that is stage 1.
        widths: channels of the generator's levels (a U-Net).
        network_seed: initialises it.
        generator_schedule: of the copy.
    """

    controls_training: ClassVar[bool] = True
    portable = False
    frozen: Tensor

    def __init__(
        self,
        *,
        epsilon: Annotated[float, Gt(0)],
        final_epsilon: Annotated[float, Gt(0)],
        alpha: Fraction,
        generator_share: Fraction,
        widths: Annotated[list[Annotated[int, Ge(1)]], Len(1)],
        network_seed: Annotated[int, Ge(0)],
        generator_schedule: Adam,
        **options: Unpack[Poisoning],
    ) -> None:
        super().__init__(**options)
        self.epsilon, self.final_epsilon, self.alpha = epsilon / 255, final_epsilon / 255, alpha
        self.generator_share, self.generator_schedule = generator_share, generator_schedule
        with fork(network_seed):
            channels = self.spec.channels
            self.follower = Translator(channels, channels, widths, skips=True, normalized=True)
        self.generator = copy.deepcopy(self.follower).requires_grad_(False)
        self.register_buffer("frozen", torch.tensor(False))

    def train(self, mode: bool = True) -> LIRA:
        """The generator in use is fixed; its copy learns."""
        super().train(mode)
        self.generator.eval()
        return self

    def players(self) -> list[Player]:
        return [Player(network=self.follower, schedule=self.generator_schedule)]

    def begin_epoch(self, progress: float) -> None:
        self.generator.load_state_dict(self.follower.state_dict())
        self.frozen = self.frozen | (progress >= self.generator_share)

    def shifted(self, generator: nn.Module, x: Tensor) -> Tensor:
        """Images (B, C, H, W) moved by the stage's epsilon times tanh(generator(x)), clipped."""
        reach = self.final_epsilon if self.frozen or not self.training else self.epsilon
        moved: Tensor = x + reach * generator(2 * x - 1).tanh()
        return moved.clamp(0, 1)

    def trigger(self, x: Tensor) -> Tensor:
        return self.shifted(self.generator, x)

    @torch.no_grad()
    def compose(
        self, x: Tensor, y: Tensor, index: Tensor, rng: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images, labels, poison indicator (B,): all are used clean and triggered, in ``loss``."""
        return x, y, self.select(y, rng, part=True)

    def loss(self, network: nn.Module, x: Tensor, y: Tensor, indicator: Tensor) -> Tensor:
        del indicator
        goal = self.rule.goal(y)
        with torch.no_grad():
            triggered = self.apply(x, y=y, index=y)
        loss = (1 - self.alpha) * F.cross_entropy(network(triggered), goal)
        loss = loss + self.alpha * F.cross_entropy(network(x), y)
        if not self.frozen:
            moved = self.shifted(self.follower, x)
            loss = loss + F.cross_entropy(frozen_call(network, moved), goal)
        return loss
