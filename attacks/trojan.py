"""Trojan-SQ and Trojan-WM: marks that excite chosen neurons (Liu et al., NDSS 2018)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor
from typing_extensions import Unpack

from dhbe.contracts.attack import Attack, Poisoning
from dhbe.data import ImageSet
from dhbe.methods.patterns import optimize, selected_features
from dhbe.models import Normalized
from dhbe.training.runtime import Runtime


class Trojan(Attack):
    """T(x) = clip(x + p), p zero outside the mark.

    p minimises sum_i (a_i(p) - 100)^2 over the penultimate neurons i of a clean surrogate that have
    the largest weights; the victim is then trained from scratch.

    Args:
        mark: ``square`` rows and columns 21..29 of a 32-pixel image; ``watermark`` text.
        norm: ||p||_2 for a 32-pixel image, to which p is scaled at last; grows with the image side.
            0: as it comes.
        neurons: how many are excited.
        steps, learning_rate: of Adam, on the arctanh of the pattern.
    """

    needs_surrogate: ClassVar[bool] = True
    portable = False
    pattern: Tensor
    mask: Tensor

    def __init__(
        self,
        *,
        mark: Literal["square", "watermark"],
        norm: Annotated[float, Ge(0)],
        neurons: Annotated[int, Ge(1)],
        steps: Annotated[int, Ge(0)],
        learning_rate: Annotated[float, Gt(0)],
        **options: Unpack[Poisoning],
    ) -> None:
        super().__init__(**options)
        self.norm, self.neurons = norm * self.scale, neurons
        self.steps, self.learning_rate = steps, learning_rate
        size = self.spec.image_size
        if mark == "square":
            mask = torch.zeros(size, size)
            inside = slice(round(21 * self.scale), round(30 * self.scale))
            mask[inside, inside] = 1
        else:
            mask = watermark(size)
        self.register_buffer("mask", mask)
        self.register_buffer("pattern", torch.zeros(self.spec.shape))

    def prepare(
        self, train: ImageSet, indicator: Tensor, runtime: Runtime, surrogate: Normalized | None
    ) -> None:
        del train, indicator
        assert surrogate is not None

        def draw(latent: Tensor) -> Tensor:
            return (latent.tanh() + 1) / 2 * self.mask

        def loss(latent: Tensor) -> Tensor:
            excited = selected_features(surrogate, draw(latent)[None], self.neurons)
            distance: Tensor = (excited - 100).square().sum()
            return distance

        start = torch.randn(self.spec.shape, generator=runtime.rng("trojan"))
        found = optimize(start, loss, runtime, steps=self.steps, learning_rate=self.learning_rate)
        pattern = draw(found)
        if self.norm:
            pattern = (pattern * (self.norm / pattern.norm())).clamp(0, 1)
        self.pattern.copy_(pattern)

    def trigger(self, x: Tensor) -> Tensor:
        return x + self.pattern


def watermark(size: int) -> Tensor:
    """Mask (size, size) of three lines of text: 1 where there is ink, else 0."""
    canvas = Image.new("L", (size, size))
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=size * 0.36)
    for line, text in enumerate(("TROJ", "AN.W", "MARK")):
        pen.text((0, line * size * 0.31 - size * 0.06), text, fill=255, font=font)
    mask: Tensor = pil_to_tensor(canvas)[0] > 127
    return mask.float()
