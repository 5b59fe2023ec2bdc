"""Images imagined from a network: procedural ones, changed until it takes them for its own kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor
from torch.nn import functional as F

from dhbe.game.statistics import statistics_gaps
from dhbe.methods.losses import neighbour_l1
from dhbe.methods.procedural import procedural
from dhbe.models import Normalized
from dhbe.training.parallel import Processes
from dhbe.training.runtime import Runtime

SHIFT = 3
"""Pixels by which the images move at most while they are changed: no pixel then decides alone."""


@dataclass(frozen=True, kw_only=True)
class Imagination:
    """How images are imagined: DeepInversion (Yin et al., CVPR 2020) from procedural images.

    Adam changes the pixels so that the BatchNorms see the means and variances that they keep, each
    image is taken for a class, and neighbours stay alike. The last matters most: without it the
    images are so full of fine evidence for their class that a real trigger does not move them.

    Attributes:
        count: of the images, an equal number per class.
        steps: of Adam, with ``rate`` in units of pixels in [0, 1].
        label: weight of the cross-entropy.
        smoothness: of ``neighbour_l1``.
    """

    count: Annotated[int, Ge(2)]
    batch_size: Annotated[int, Ge(2)]
    steps: Annotated[int, Ge(1)]
    rate: Annotated[float, Gt(0)]
    label: Annotated[float, Ge(0)]
    smoothness: Annotated[float, Ge(0)]

    def images(self, network: Normalized, runtime: Runtime) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W) in [0, 1] and the classes (N,) that they were made for."""
        spec, rng = network.spec, runtime.rng("imagined")
        start = procedural(self.count, spec.channels, spec.image_size, rng)
        start = start.to(runtime.device, runtime.dtype)
        labels = (torch.arange(self.count) % spec.classes).to(runtime.device)
        parts = zip(start.split(self.batch_size), labels.split(self.batch_size), strict=True)
        return torch.cat([self._changed(network, x, y, runtime, rng) for x, y in parts]), labels

    def _changed(
        self, network: Normalized, x: Tensor, y: Tensor, runtime: Runtime, rng: torch.Generator
    ) -> Tensor:
        x = x.clone().requires_grad_(True)
        adam = torch.optim.Adam([x], lr=self.rate, betas=(0.8, 0.95))
        fall = torch.optim.lr_scheduler.CosineAnnealingLR(adam, self.steps, 0.1 * self.rate)
        for _ in range(self.steps):
            seen = _moved(x, rng)
            with runtime.autocast(), statistics_gaps(network, Processes()) as gaps:
                logits = network(seen)
            loss = self.label * F.cross_entropy(logits.float(), y)
            loss = loss + self.smoothness * neighbour_l1(x)
            if gaps:
                loss = loss + torch.stack(gaps).mean()
            (x.grad,) = torch.autograd.grad(loss, [x])
            adam.step()
            fall.step()
            with torch.no_grad():
                x.clamp_(0, 1)
        return x.detach()


def _moved(x: Tensor, rng: torch.Generator) -> Tensor:
    """The images shifted together, and mirrored every other time."""
    size, (top, left) = x.shape[-1], torch.randint(2 * SHIFT + 1, (2,), generator=rng).tolist()
    padded = F.pad(x, (SHIFT,) * 4, mode="reflect")[:, :, top : top + size, left : left + size]
    return padded.flip(3) if torch.rand((), generator=rng) < 0.5 else padded
