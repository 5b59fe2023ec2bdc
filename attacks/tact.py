"""TaCT: only one class is attacked; others wear the trigger harmlessly (Tang et al., 2021)."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Unpack

from dhbe.contracts.attack import Attack, Poisoning
from dhbe.core.errors import got
from dhbe.core.rng import generator


class TaCT(Attack):
    """A square in the lower right corner; cover images of other classes keep their label.

    USENIX Security 2021, arXiv 1908.00686. The square is of seeded colours, in place of the
    authors' picture. ASR is that of the source classes alone.

    Args:
        cover_classes: whose images are covers; empty: all but the source classes and the target.
        patch_size: side in a 32-pixel image, scaled with the image.
        pattern_seed: draws the colours.
    """

    patch: Tensor

    def __init__(
        self,
        *,
        cover_classes: list[Annotated[int, Ge(0)]],
        patch_size: Annotated[int, Ge(1)],
        pattern_seed: Annotated[int, Ge(0)],
        **options: Unpack[Poisoning],
    ) -> None:
        super().__init__(**options)
        harmless = set(range(self.spec.classes)) - set(options["source_classes"])
        harmless -= {options["target_class"]}
        if not set(cover_classes) <= harmless:
            allowed = f"among {sorted(harmless)}, neither source nor target"
            raise got("attack.cover_classes", cover_classes, allowed)
        self.covers = torch.tensor(sorted(cover_classes or harmless))
        drawn = torch.rand(
            self.spec.channels, patch_size, patch_size, generator=generator(pattern_seed)
        )
        side = min(max(1, round(patch_size * self.scale)), self.spec.image_size)
        self.register_buffer("patch", F.interpolate(drawn.round()[None], side, mode="nearest")[0])

    def coverable(self, y: Tensor) -> Tensor:
        return torch.isin(y, self.covers.to(y.device))

    def trigger(self, x: Tensor) -> Tensor:
        side, out = self.patch.shape[-1], x.clone()
        out[:, :, -side:, -side:] = self.patch.to(x.dtype)
        return out
