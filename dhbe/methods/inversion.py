"""Universal triggers found by following the gradient of a network: patches and faint changes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from torch.nn import functional as F

from dhbe.training.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class Kind(ABC):
    """A family of triggers, each held as values (C, side, side) within ``bounds``.

    Attributes:
        side: pixels.
    """

    side: Annotated[int, Ge(1)]

    @property
    @abstractmethod
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest value, of pixels in [0, 1]."""

    def shown(self, values: Tensor) -> Tensor:
        """The values as pictures: 0 to 1 over the range."""
        low, high = self.bounds
        return (values - low) / (high - low)

    @abstractmethod
    def applied(self, values: Tensor, x: Tensor, rng: torch.Generator) -> Tensor:
        """Images (B, C, H, W) in [0, 1], each with its trigger (B, C, side, side)."""


class Patch(Kind):
    """A square in place of the pixels, somewhere else in each image."""

    @property
    def bounds(self) -> tuple[float, float]:
        return 0.0, 1.0

    def applied(self, values: Tensor, x: Tensor, rng: torch.Generator) -> Tensor:
        free = x.shape[-1] - self.side + 1  # images are square
        drawn = torch.rand((len(x), 2), generator=rng, device=rng.device)
        corner = (drawn * free).long().to(x.device)
        span, image, channel = (
            torch.arange(n, device=x.device) for n in (self.side, len(x), x.shape[1])
        )
        rows, columns = (corner[:, i, None] + span for i in (0, 1))
        where = (
            image[:, None, None, None],
            channel[:, None, None],
            rows[:, None, :, None],
            columns[:, None, None],
        )
        return x.index_put(where, values.to(x.dtype))


@dataclass(frozen=True, kw_only=True)
class Faint(Kind):
    """A change of the whole image, smooth where ``side`` is smaller than the image.

    Attributes:
        amplitude: the largest change of a pixel, of [0, 1]; interpolation may add a little.
    """

    amplitude: Annotated[float, Gt(0), Le(1)]

    @property
    def bounds(self) -> tuple[float, float]:
        return -self.amplitude, self.amplitude

    def applied(self, values: Tensor, x: Tensor, rng: torch.Generator) -> Tensor:
        del rng
        change = F.interpolate(values, x.shape[-2:], mode="bicubic", align_corners=True)
        return (x + change).clamp(0, 1)


class Triggers(nn.Module):
    """Triggers of one kind that move along gradients; ``values`` are (N, C, side, side)."""

    momentum: Tensor

    def __init__(
        self, kind: Kind, count: int, channels: int, rng: torch.Generator, like: Tensor
    ) -> None:
        super().__init__()
        self.kind, (self.low, self.high) = kind, kind.bounds
        drawn = torch.rand((count, channels, kind.side, kind.side), generator=rng)
        start = self.low + (self.high - self.low) * (0.25 + 0.5 * drawn)
        self.values = nn.Parameter(start.to(like))
        self.register_buffer("momentum", torch.zeros_like(start).to(like))

    def forward(self, x: Tensor, which: Tensor, rng: torch.Generator) -> Tensor:
        """Images (B, C, H, W), each with the trigger of that number (B,)."""
        return self.kind.applied(self.values[which], x, rng)

    @torch.no_grad()
    def climb(self, rate: float) -> None:
        """Move each value up its gradient by ``rate`` of its range, by a running mean's sign."""
        gradient, self.values.grad = self.values.grad, None
        assert gradient is not None, "no backward pass since the last step"
        scale = gradient.abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-12)
        self.momentum.mul_(0.7).add_(gradient / scale)
        step = rate * (self.high - self.low)
        self.values.add_(step * self.momentum.sign()).clamp_(self.low, self.high)


class Mixture(nn.Module):
    """Triggers of several kinds; each kind meets its share of a batch."""

    def __init__(
        self, kinds: Sequence[Kind], copies: int, channels: int, rng: torch.Generator, like: Tensor
    ) -> None:
        super().__init__()
        self.copies = copies
        self.parts = nn.ModuleList(Triggers(k, copies, channels, rng, like) for k in kinds)

    def forward(self, x: Tensor, rng: torch.Generator) -> Tensor:
        """Images (B, C, H, W), each with a trigger; the copies take turns."""
        turns = torch.arange(len(x), device=x.device) % self.copies
        count = len(self.parts)
        shares = zip(self.parts, x.tensor_split(count), turns.tensor_split(count), strict=True)
        return torch.cat([made(images, which, rng) for made, images, which in shares])

    def climb(self, rate: float) -> None:
        """See ``Triggers``."""
        for part in self.parts:
            assert isinstance(part, Triggers)
            part.climb(rate)


def margins(logits: Tensor, targets: Tensor) -> Tensor:
    """Target's logit (B,) less the largest of the others; positive where the target is said."""
    own = logits.gather(1, targets[:, None])
    return (own - logits.scatter(1, targets[:, None], -torch.inf).amax(1, keepdim=True))[:, 0]


@dataclass(frozen=True, kw_only=True)
class Search:
    """One trigger per class and kind, sought on images of the other classes.

    Attributes:
        steps: of the ascent of the target's log-probability, with ``per_class`` images each.
        rate: of the first step, as a share of the range of values; it falls linearly.
        judged: images per class that the found triggers are measured on.
    """

    steps: Annotated[int, Ge(1)]
    per_class: Annotated[int, Ge(1)]
    rate: Annotated[float, Gt(0)]
    judged: Annotated[int, Ge(1)]

    def __call__(
        self, network: nn.Module, x: Tensor, y: Tensor, kind: Kind, classes: int, runtime: Runtime
    ) -> tuple[Tensor, Tensor]:
        """Found triggers (K, C, side, side), and the mean margin (K,) that each class reaches."""
        rng = runtime.rng("search", kind)
        triggers = Triggers(kind, classes, x.shape[1], rng, x)
        targets = torch.arange(classes, device=x.device).repeat_interleave(self.per_class)
        for step in range(self.steps):
            drawn = torch.randint(len(x), (len(targets),), generator=rng).to(x.device)
            with runtime.autocast():
                logits = network(triggers(x[drawn], targets, rng)).float()
            loss = F.cross_entropy(logits, targets, reduction="none") * (y[drawn] != targets)
            (-loss.sum()).backward()
            triggers.climb(self.rate * (1 - step / self.steps))
        found = triggers.values.detach()
        return found, self._reached(network, x, y, triggers, runtime, rng)

    @torch.no_grad()
    def _reached(
        self,
        network: nn.Module,
        x: Tensor,
        y: Tensor,
        triggers: Triggers,
        runtime: Runtime,
        rng: torch.Generator,
    ) -> Tensor:
        reached = []
        for target in range(len(triggers.values)):
            others = x[y != target][: self.judged]
            which = torch.full((len(others),), target, device=x.device)
            with runtime.autocast():
                logits = network(triggers(others, which, rng)).float()
            reached.append(margins(logits, which).mean())
        return torch.stack(reached)


def anomaly_index(reached: Tensor) -> Tensor:
    """How far each margin (K,) lies above the median, in units of 1 + the median distance to it.

    Neural Cleanse's index (Wang et al., S&P 2019) for margins instead of mask sizes; the 1 keeps
    it small where all classes are alike.
    """
    apart = reached - reached.median()
    return apart / (1 + apart.abs().median())
