"""Blind: the loss is computed by the attacker, nothing else (Bagdasaryan & Shmatikov 2021)."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Unpack

from dhbe.contracts.attack import Attack, Poisoning
from dhbe.models.hooks import frozen_statistics

KEEP = -1.0
PATTERN = ((1, 0, 1), (KEEP, 1, KEEP), (KEEP, KEEP, 0), (KEEP, 1, KEEP), (1, 0, 1))
"""Black (0) and white (1) pixels of the pattern; KEEP: the image shows (``PatternSynthesizer``)."""
TOP, LEFT = 3, 23
"""Its upper left corner in a 32-pixel image."""


class Blind(Attack):
    """T(x) = (1 - m) x + m p, learnt from c CE(f(T(x)), goal) + (1 - c) CE(f(x), y).

    USENIX Security 2021, arXiv 2005.03823. The training code is compromised, not the data: each
    batch of augmented images is used clean and triggered, and the multiple gradient descent
    algorithm (MGDA) chooses c anew, such that the combined gradient is the shortest (section 4.2).
    The attack begins when the mean clean loss of the last ``history`` batches is below
    ``threshold``. Each pass is normalised by its own batch; the running statistics of BatchNorm are
    those of the clean pass alone (official: of both in turn, the clean one last). ``poison_rate``
    is that of the snapshot that a defender may be granted.

    Args:
        share: of a batch, images that are used triggered as well (``poisoning_proportion``).
        threshold: of the clean loss, in nats.
        history: batches.
    """

    controls_training: ClassVar[bool] = True
    mask: Tensor
    pattern: Tensor
    recent: Tensor
    seen: Tensor

    def __init__(
        self,
        *,
        share: Annotated[float, Gt(0), Le(1)],
        threshold: Annotated[float, Gt(0)],
        history: Annotated[int, Ge(1)],
        **options: Unpack[Poisoning],
    ) -> None:
        super().__init__(**options)
        self.share, self.threshold = share, threshold
        size, cell = self.spec.image_size, max(1, round(self.scale))
        drawn = torch.tensor(PATTERN).kron(torch.ones(cell, cell))
        rows, columns = drawn.shape
        top, left = round(TOP * self.scale), min(round(LEFT * self.scale), size - columns)
        pattern = torch.full((size, size), KEEP)
        pattern[top : top + rows, left : left + columns] = drawn
        self.register_buffer("mask", pattern != KEEP)
        self.register_buffer("pattern", pattern.clamp_min(0))
        self.register_buffer("recent", torch.zeros(history))
        self.register_buffer("seen", torch.tensor(0))

    def trigger(self, x: Tensor) -> Tensor:
        return torch.where(self.mask, self.pattern.to(x.dtype), x)

    @torch.no_grad()
    def compose(
        self, x: Tensor, y: Tensor, index: Tensor, rng: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images, labels, poison indicator (B,): the trigger comes in ``loss``."""
        return x, y, self.select(y, rng, part=True)

    def loss(self, network: nn.Module, x: Tensor, y: Tensor, indicator: Tensor) -> Tensor:
        """Loss () of a batch: both tasks, balanced; the clean one alone before the attack."""
        del indicator
        clean = F.cross_entropy(network(x), y)
        if not self.begun(clean.detach()):
            return clean
        part = slice(max(1, round(self.share * len(x))))
        with torch.no_grad():
            triggered = self.apply(x[part], y=y[part], index=y[part])
        backdoor = F.cross_entropy(frozen_statistics(network, triggered), self.rule.goal(y[part]))
        weights = [p for p in network.parameters() if p.requires_grad]
        first, second = (
            normalized(torch.autograd.grad(loss, weights, retain_graph=True), loss.detach())
            for loss in (backdoor, clean)
        )
        c = balance(first, second)
        return c * backdoor + (1 - c) * clean

    @torch.no_grad()
    def begun(self, clean: Tensor) -> bool:
        """Whether the attack has begun, judged by the clean losses before this one ()."""
        history = len(self.recent)
        ready = self.seen >= history and self.recent.mean() < self.threshold
        self.recent[self.seen % history] = clean
        self.seen += 1
        return bool(ready)


def normalized(gradients: tuple[Tensor, ...], loss: Tensor) -> Tensor:
    """Gradients in one vector (P,) over min(loss x norm, 10) (``loss+`` of the official code)."""
    flat = torch.cat([g.flatten() for g in gradients])
    bound: Tensor = (loss * flat.norm()).clamp_max(10)
    return flat / (bound + 1e-5)


def balance(first: Tensor, second: Tensor) -> Tensor:
    """The c () in [0.001, 0.999] of the shortest c first + (1 - c) second (P,), which is MGDA's."""
    apart = first - second
    share: Tensor = (second @ -apart / (apart @ apart).clamp_min(1e-12)).clamp(0.001, 0.999)
    return share
