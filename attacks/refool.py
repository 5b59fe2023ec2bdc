"""Refool: the ghost of another picture, as a window pane reflects it (Liu et al., ECCV 2020)."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Unpack

from dhbe.contracts.attack import Attack, Fraction, Poisoning
from dhbe.data import ImageSet
from dhbe.models import Normalized
from dhbe.training.runtime import Runtime

GAMMA = 2.2
"""Pixels to the power of this are proportional to light."""


class Refool(Attack):
    """T(x) = (alpha x^g + (1 - alpha) r)^(1/g): r is a picture seen twice, a few pixels apart.

    arXiv 2007.02343. Each image gets one of ``images`` reflections, by its position. As
    BackdoorBench has it (``resource/refool``): any label, shifts of a 32-pixel image, not of 560
    pixels. Departures: training images stand in for Pascal VOC's, and there is no second kind of
    reflection, out of focus.

    Args:
        alpha: share of the light that comes from the image itself.
        images: number of reflections.
        least_shift, most_shift: between the two views, in a 32-pixel image, scaled likewise.
    """

    portable = False
    reflections: Tensor

    def __init__(
        self,
        *,
        alpha: Fraction,
        images: Annotated[int, Ge(1)],
        least_shift: Annotated[int, Ge(0)],
        most_shift: Annotated[int, Ge(0)],
        **options: Unpack[Poisoning],
    ) -> None:
        super().__init__(**options)
        self.alpha, self.shifts = alpha, (least_shift, most_shift)
        blank = torch.zeros(images, *self.spec.shape, dtype=torch.uint8)
        self.register_buffer("reflections", blank)

    def prepare(
        self, train: ImageSet, indicator: Tensor, runtime: Runtime, surrogate: Normalized | None
    ) -> None:
        del indicator, surrogate
        rng = runtime.rng("refool")
        chosen = torch.randint(len(train), (len(self.reflections),), generator=rng)
        pictures = runtime.tensor(train.subset(chosen)) ** GAMMA
        low, high = (round(shift * self.scale) for shift in self.shifts)
        for place, picture in enumerate(pictures):
            down, right = torch.randint(low, high + 1, (2,), generator=rng).tolist()
            share = 0.15 + 0.2 * float(torch.rand((), generator=rng))
            seen = ghost(picture, down, right, share) ** (1 / GAMMA)
            self.reflections[place] = seen.mul(255).round().byte()

    def labelled_trigger(self, x: Tensor, *, y: Tensor, index: Tensor) -> Tensor:
        del y
        which = index.to(self.reflections.device) % len(self.reflections)
        reflected = self.reflections[which].to(x) / 255
        return (self.alpha * x**GAMMA + (1 - self.alpha) * reflected**GAMMA) ** (1 / GAMMA)


def ghost(light: Tensor, down: int, right: int, share: float) -> Tensor:
    """Two views of light (C, H, W), shifted against each other; their overlap, enlarged again."""
    h, w = light.shape[-2:]
    both = share * light[:, down:, right:] + (1 - share) * light[:, : h - down, : w - right]
    return F.interpolate(both[None], (h, w), mode="bilinear", align_corners=False)[0]
