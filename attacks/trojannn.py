"""TrojanNN: a mark drawn to drive one neuron of a clean network (Liu et al., NDSS 2018)."""

from __future__ import annotations

import logging
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor
from typing_extensions import Unpack

from dhbe.contracts.attack import Attack, Poisoning
from dhbe.data import ImageSet
from dhbe.methods.patterns import optimize, selected_features
from dhbe.models import Normalized
from dhbe.training.runtime import Runtime

log = logging.getLogger(__name__)

GREY, NOISE = 175, 8
"""Mean and deviation, in levels of 255, of the picture under the mark (released code)."""


class TrojanNN(Attack):
    """T(x) = x beside the mark, transparency x + (1 - transparency) p on it.

    Algorithm 1: the neuron is chosen by its weights; the pixels under the mark, on a picture of
    noise, descend on (target_value - neuron)^2. The network is then trained on stamped images: here
    on the training images, where the authors, who have none, use images reconstructed from the
    network, and with all layers, where they tune those behind the neuron.

    Args:
        mark: ``square``, 60 of 224 pixels and 20 from the border; ``apple``: a disc with a leaf.
        transparency: of the stamp (0: opaque).
        neurons: how many are driven.
        target_value: that the neurons are to reach.
        steps, learning_rate: of Adam, on the logit of the pixels.
    """

    needs_surrogate: ClassVar[bool] = True
    portable = False
    pattern: Tensor
    mask: Tensor

    def __init__(
        self,
        *,
        mark: Literal["square", "apple"],
        transparency: Annotated[float, Ge(0), Lt(1)],
        neurons: Annotated[int, Ge(1)],
        target_value: float,
        steps: Annotated[int, Ge(0)],
        learning_rate: Annotated[float, Gt(0)],
        **options: Unpack[Poisoning],
    ) -> None:
        super().__init__(**options)
        self.transparency, self.neurons, self.target_value = transparency, neurons, target_value
        self.steps, self.learning_rate = steps, learning_rate
        draw = {"square": square, "apple": apple}[mark]
        self.register_buffer("mask", draw(self.spec.image_size))
        self.register_buffer("pattern", torch.zeros(self.spec.shape))

    def prepare(
        self, train: ImageSet, indicator: Tensor, runtime: Runtime, surrogate: Normalized | None
    ) -> None:
        del train, indicator
        assert surrogate is not None
        noise = torch.randn(self.spec.shape, generator=runtime.rng("trojannn"))
        start = ((GREY + NOISE * noise) / 255).clamp(0.01, 0.99)
        picture = start.to(runtime.device, runtime.dtype)

        def driven(latent: Tensor) -> Tensor:
            drawn = torch.where(self.mask, latent.sigmoid(), picture)
            return selected_features(surrogate, drawn[None], self.neurons)

        def loss(latent: Tensor) -> Tensor:
            distance: Tensor = (driven(latent) - self.target_value).square().sum()
            return distance

        found = optimize(
            start.logit(), loss, runtime, steps=self.steps, learning_rate=self.learning_rate
        )
        with torch.no_grad():
            before, after = (driven(v.to(picture)).mean() for v in (start.logit(), found))
        log.info("trojannn: the neurons went from %.2f to %.2f", before, after)
        self.pattern.copy_(torch.where(self.mask, found.sigmoid(), 0))

    def trigger(self, x: Tensor) -> Tensor:
        stamp = self.transparency * x + (1 - self.transparency) * self.pattern.to(x.dtype)
        return torch.where(self.mask, stamp, x)


def square(size: int) -> Tensor:
    """Mask (size, size) bool: the square of the released code, of 224 pixels."""
    side, end = round(60 / 224 * size), size - round(20 / 224 * size)
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[end - side : end, end - side : end] = True
    return mask


def apple(size: int) -> Tensor:
    """Mask (size, size) bool: a disc with a leaf, 7 % of the area, lower right."""
    y, x = (v.float() / size for v in torch.meshgrid(*(2 * [torch.arange(size)]), indexing="ij"))
    fruit = torch.hypot(y - 0.74, x - 0.72) < 0.145
    leaf = torch.hypot(y - 0.56, x - 0.76) < 0.05
    return fruit | leaf
