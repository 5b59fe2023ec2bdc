"""Label-consistent: adversarial noise hides the class, a patch replaces it (Turner et al. 2019)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor
from typing_extensions import Unpack

from dhbe.contracts.attack import Attack, Poisoning
from dhbe.core.types import POISON
from dhbe.data import ImageSet, to_float
from dhbe.methods.adversarial import pgd
from dhbe.models import Normalized
from dhbe.training.runtime import Runtime


class LabelConsistent(Attack):
    """Training: T(x + PGD noise), true label; test: T(x) (arXiv 1912.02771).

    The noise climbs CE(surrogate(x), y) inside an l-infinity ball, so the patch is the easiest
    thing left to learn. The surrogate is plainly trained; Turner et al. prefer an adversarially
    trained one.

    Args:
        amplitude: of the patch: 1 overwrites, less is added and clipped.
        epsilon, step_size: of the noise, in levels of 255.
        steps: of PGD, without random start (BackdoorBench: epsilon 8, step 1.5, 100 steps).
    """

    clean_label = True
    needs_surrogate: ClassVar[bool] = True
    mask: Tensor
    patch: Tensor
    noisy: Tensor
    noisy_index: Tensor

    def __init__(
        self,
        *,
        amplitude: Annotated[float, Gt(0), Le(1)],
        epsilon: Annotated[float, Ge(0), Le(255)],
        step_size: Annotated[float, Gt(0)],
        steps: Annotated[int, Ge(0)],
        **options: Unpack[Poisoning],
    ) -> None:
        super().__init__(**options)
        self.amplitude = amplitude
        self.epsilon, self.step_size, self.steps = epsilon / 255, step_size / 255, steps
        mask, patch = corners(self.spec.image_size, max(1, round(self.scale)))
        self.register_buffer("mask", mask)
        self.register_buffer("patch", patch)
        self.register_buffer("noisy", torch.zeros((0, *self.spec.shape), dtype=torch.uint8))
        self.register_buffer("noisy_index", torch.zeros(0, dtype=torch.int64))

    def prepare(
        self, train: ImageSet, indicator: Tensor, runtime: Runtime, surrogate: Normalized | None
    ) -> None:
        assert surrogate is not None
        index = (indicator == POISON).nonzero().flatten()
        chosen = train.subset(index)
        x, y = runtime.tensor(chosen), runtime.labels(chosen)
        parts = []
        for images, labels in zip(x.split(256), y.split(256), strict=True):
            noisy = pgd(
                surrogate,
                images,
                labels,
                epsilon=self.epsilon,
                step_size=self.step_size,
                steps=self.steps,
            )
            parts.append(noisy.mul(255).round().byte())
        self.noisy, self.noisy_index = torch.cat(parts), index.to(self.patch.device)

    def training_images(
        self, x: Tensor, *, y: Tensor, indicator: Tensor, index: Tensor, rng: torch.Generator
    ) -> Tensor:
        where = torch.searchsorted(self.noisy_index, index.to(self.noisy_index.device))
        noisy = to_float(self.noisy[where.clamp_max(len(self.noisy) - 1)]).to(x.device, x.dtype)
        base = torch.where((indicator == POISON)[:, None, None, None], noisy, x)
        return super().training_images(base, y=y, indicator=indicator, index=index, rng=rng)

    def trigger(self, x: Tensor) -> Tensor:
        if self.amplitude == 1:
            return torch.where(self.mask > 0, self.patch, x)
        return x + self.amplitude * self.mask * (2 * self.patch - 1)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        """The number of noisy images is known from the file alone."""
        for name in ("noisy", "noisy_index"):
            if prefix + name in state:
                setattr(self, name, torch.empty_like(state[prefix + name]))
        super()._load_from_state_dict(state, prefix, *args)


def corners(size: int, cell: int) -> tuple[Tensor, Tensor]:
    """Mask and patch (size, size): a 3x3 grid in each corner, mirrored on the left."""
    right = torch.tensor([[0.0, 0, 1], [0, 1, 0], [1, 0, 1]]).kron(torch.ones(cell, cell))
    side = len(right)
    mask, patch = torch.zeros(size, size), torch.zeros(size, size)
    for rows in (slice(0, side), slice(size - side, size)):
        for columns, block in ((slice(0, side), right.flip(1)), (slice(size - side, size), right)):
            mask[rows, columns], patch[rows, columns] = 1, block
    return mask, patch
