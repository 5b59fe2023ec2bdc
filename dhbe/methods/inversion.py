"""Universal triggers, mostly found along a network's gradient: patches, faint changes, waves."""

from __future__ import annotations

import functools
import math
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
    """A family of triggers, each held as values within ``bounds``."""

    @property
    @abstractmethod
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest value, of pixels in [0, 1] unless said otherwise."""

    @property
    def variants(self) -> int:
        """Number of forms of this kind, such as corners or frequencies."""
        return 1

    @abstractmethod
    def shape(self, channels: int) -> tuple[int, int, int]:
        """Of a trigger's values."""

    def shown(self, values: Tensor) -> Tensor:
        """Values (N, *shape) as pictures: the kind's range mapped to [0, 1]."""
        low, high = self.bounds
        return (values - low) / (high - low)

    @abstractmethod
    def applied(self, values: Tensor, x: Tensor, variant: Tensor, rng: torch.Generator) -> Tensor:
        """Images (B, C, H, W) in [0, 1], each with its trigger's values and its variant (B,)."""


@dataclass(frozen=True, kw_only=True)
class Square(Kind):
    """Triggers whose values are a picture (C, side, side).

    Attributes:
        side: pixels.
    """

    side: Annotated[int, Ge(1)]

    def shape(self, channels: int) -> tuple[int, int, int]:
        return channels, self.side, self.side


class Patch(Square):
    """A square in place of the pixels, somewhere else in each image."""

    @property
    def bounds(self) -> tuple[float, float]:
        return 0.0, 1.0

    def applied(self, values: Tensor, x: Tensor, variant: Tensor, rng: torch.Generator) -> Tensor:
        free = x.shape[-1] - self.side + 1  # images are square
        drawn = torch.rand((len(x), 2), generator=rng, device=rng.device)
        return pasted(values, x, (drawn * free).long().to(x.device))


class CornerPatch(Patch):
    """A square in one corner of every image; each corner is a variant."""

    @property
    def variants(self) -> int:
        return 4

    def applied(self, values: Tensor, x: Tensor, variant: Tensor, rng: torch.Generator) -> Tensor:
        del rng
        far = x.shape[-1] - self.side
        return pasted(values, x, torch.stack([variant // 2, variant % 2], dim=1) * far)


def pasted(values: Tensor, x: Tensor, corner: Tensor) -> Tensor:
    """Images (B, C, H, W) with squares (B, C, side, side) at rows and columns (B, 2)."""
    side = values.shape[-1]
    span, image, channel = (torch.arange(n, device=x.device) for n in (side, len(x), x.shape[1]))
    rows, columns = (corner[:, i, None] + span for i in (0, 1))
    where = (
        image[:, None, None, None],
        channel[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None],
    )
    return x.index_put(where, values.to(x.dtype))


@dataclass(frozen=True, kw_only=True)
class Faint(Square):
    """A change of the whole image, smooth where ``side`` is smaller than the image.

    Attributes:
        amplitude: the largest change of a pixel, of [0, 1]; interpolation may add a little.
    """

    amplitude: Annotated[float, Gt(0), Le(1)]

    @property
    def bounds(self) -> tuple[float, float]:
        return -self.amplitude, self.amplitude

    def applied(self, values: Tensor, x: Tensor, variant: Tensor, rng: torch.Generator) -> Tensor:
        del variant, rng
        change = F.interpolate(values, x.shape[-2:], mode="bicubic", align_corners=True)
        return (x + change).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class Wave(Kind):
    """Sinusoids over the whole image (SIG, Barni et al., ICIP 2019), one frequency per variant.

    The values (C, 2, 1) are the amplitudes of sine and cosine.

    Attributes:
        amplitude: the largest of either, of [0, 1].
        frequencies: periods per image, downwards and to the right.
    """

    amplitude: Annotated[float, Gt(0), Le(1)]
    frequencies: tuple[tuple[int, int], ...]

    @property
    def bounds(self) -> tuple[float, float]:
        return -self.amplitude, self.amplitude

    @property
    def variants(self) -> int:
        return len(self.frequencies)

    def shape(self, channels: int) -> tuple[int, int, int]:
        return channels, 2, 1

    def applied(self, values: Tensor, x: Tensor, variant: Tensor, rng: torch.Generator) -> Tensor:
        del rng
        waves = sinusoids(self.frequencies, x.shape[-1], x.device)[variant].to(x.dtype)
        return (x + torch.einsum("bci,bihw->bchw", values[..., 0], waves)).clamp(0, 1)


@functools.lru_cache(maxsize=4)
def sinusoids(frequencies: tuple[tuple[int, int], ...], size: int, device: torch.device) -> Tensor:
    """Sine and cosine of each frequency (V, 2, size, size), on the device."""
    periods = torch.tensor(frequencies, dtype=torch.float32)
    at = torch.arange(size) * (2 * math.pi / size)
    angle = periods[:, 0, None, None] * at[:, None] + periods[:, 1, None, None] * at
    return torch.stack([angle.sin(), angle.cos()], dim=1).to(device)


def frequencies(radius: int) -> tuple[tuple[int, int], ...]:
    """All pairs of integers up to a radius; of opposite ones, which are the same wave, one."""
    span = range(-radius, radius + 1)
    return tuple(
        (a, b) for a in span for b in span if (a, b) > (0, 0) and a * a + b * b <= radius**2
    )


class Triggers(nn.Module):
    """Triggers of one kind that move along gradients; ``values`` are (N, *kind.shape).

    There are ``count`` of each variant; trigger i is of variant i modulo ``kind.variants``.
    """

    momentum: Tensor

    def __init__(
        self, kind: Kind, count: int, channels: int, rng: torch.Generator, like: Tensor
    ) -> None:
        super().__init__()
        self.kind, (self.low, self.high) = kind, kind.bounds
        drawn = torch.rand((count * kind.variants, *kind.shape(channels)), generator=rng)
        start = self.low + (self.high - self.low) * (0.25 + 0.5 * drawn)
        self.values = nn.Parameter(start.to(like))
        self.register_buffer("momentum", torch.zeros_like(start).to(like))

    def forward(self, x: Tensor, which: Tensor, rng: torch.Generator) -> Tensor:
        """Images (B, C, H, W), each with the trigger of that number (B,)."""
        return self.kind.applied(self.values[which], x, which % self.kind.variants, rng)

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
    """``copies`` triggers per kind and variant; a kind meets its share of a batch."""

    def __init__(
        self, kinds: Sequence[Kind], copies: int, channels: int, rng: torch.Generator, like: Tensor
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Triggers(k, copies, channels, rng, like) for k in kinds)

    def forward(self, x: Tensor, rng: torch.Generator) -> Tensor:
        """Images (B, C, H, W), each with a trigger; all triggers of a kind take turns."""
        shares = zip(self.parts, x.tensor_split(len(self.parts)), strict=True)
        return torch.cat([self._shown(made, images, rng) for made, images in shares])

    def _shown(self, made: nn.Module, x: Tensor, rng: torch.Generator) -> Tensor:
        assert isinstance(made, Triggers)
        count = len(made.values)
        start = torch.randint(count, (), generator=rng, device=rng.device).to(x.device)
        turns = (start + torch.arange(len(x), device=x.device)) % count
        triggered: Tensor = made(x, turns, rng)
        return triggered

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
    """One trigger per class and variant of a kind, sought on images of the other classes.

    Attributes:
        steps: of the ascent of the target's log-probability.
        per_class: images per class and step, shared among a kind's variants.
        rate: of the first step, as a share of the range of values; it falls linearly.
        judged: images per class that the found triggers are measured on, shared likewise; where
            nothing is sought, half of them serve all classes.
    """

    steps: Annotated[int, Ge(1)]
    per_class: Annotated[int, Ge(1)]
    rate: Annotated[float, Gt(0)]
    judged: Annotated[int, Ge(1)]

    def __call__(
        self, network: nn.Module, x: Tensor, y: Tensor, kind: Kind, classes: int, runtime: Runtime
    ) -> tuple[Tensor, Tensor]:
        """The best found trigger of each class (K, *shape), and the mean margin (K,) it reaches."""
        rng = runtime.rng("search", kind)
        triggers = Triggers(kind, classes, x.shape[1], rng, x)
        count = len(triggers.values)
        which = torch.arange(count, device=x.device)
        which = which.repeat_interleave(-(-self.per_class // kind.variants))
        targets = which // kind.variants
        for step in range(self.steps):
            drawn = torch.randint(len(x), (len(which),), generator=rng).to(x.device)
            with runtime.autocast():
                logits = network(triggers(x[drawn], which, rng)).float()
            loss = F.cross_entropy(logits, targets, reduction="none") * (y[drawn] != targets)
            (-loss.sum()).backward()
            triggers.climb(self.rate * (1 - step / self.steps))
        reached = self._reached(network, x, y, triggers, runtime, rng)
        best, variant = reached.view(classes, kind.variants).max(dim=1)
        found = triggers.values.detach().unflatten(0, (classes, kind.variants))
        return found[torch.arange(classes, device=x.device), variant], best

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
        reached, variants = [], triggers.kind.variants
        for trigger in range(len(triggers.values)):
            target = trigger // variants
            others = x[y != target][: -(-self.judged // variants)]
            which = torch.full((len(others),), trigger, device=x.device)
            with runtime.autocast():
                logits = network(triggers(others, which, rng)).float()
            reached.append(margins(logits, torch.full_like(which, target)).mean())
        return torch.stack(reached)

    @torch.no_grad()
    def exhaustive(
        self,
        network: nn.Module,
        x: Tensor,
        y: Tensor,
        kind: Kind,
        values: Tensor,
        classes: int,
        runtime: Runtime,
    ) -> tuple[Tensor, Tensor]:
        """Try every variant with the same values (1, *shape), without a search.

        Returns:
            the variant (K,) that moves most towards each class, and the mean margin (K,).
        """
        x, y = x[: self.judged // 2], y[: self.judged // 2]
        targets = torch.arange(classes, device=x.device).repeat_interleave(len(x))
        others = (targets.view(classes, -1) != y).float()
        reached, rng = [], runtime.rng("exhaustive", kind)
        for variant in range(kind.variants):
            which = torch.full((len(x),), variant, device=x.device)
            with runtime.autocast():
                triggered = kind.applied(values.expand(len(x), -1, -1, -1), x, which, rng)
                logits = network(triggered).float()
            each = margins(logits.repeat(classes, 1), targets).view(classes, -1)
            reached.append((each * others).sum(dim=1) / others.sum(dim=1))
        best, which = torch.stack(reached).max(dim=0)
        return which, best


def anomaly_index(reached: Tensor) -> Tensor:
    """How far each margin (K,) lies above the median, in units of 1 + the median distance to it.

    Neural Cleanse's index (Wang et al., S&P 2019) for margins instead of mask sizes; the 1 keeps
    it small where all classes are alike.
    """
    apart = reached - reached.median()
    return apart / (1 + apart.abs().median())


def lead(scores: Tensor) -> Tensor:
    """Score minus the largest of the other scores, for each of (K,); negative but for one."""
    best = scores.topk(2)
    others = best.values[0].expand_as(scores).clone()
    others[best.indices[0]] = best.values[1]
    return scores - others
