"""A trigger that the user has as a picture: a suspected one, or one of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Ge
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor
from typing_extensions import Unpack

from dhbe.contracts.attack import Attack, Fraction, Poisoning
from dhbe.core.errors import got
from dhbe.data.images import image_bytes, unpack

Place = Annotated[int, Ge(0)] | None


class Picture(Attack):
    """T(x) = (1 - a m) x + a m p: the picture p covers pixels where it is not transparent (m).

    Args:
        path: image file; one smaller than the images keeps its size in pixels, a larger one is
            resized to cover them.
        opacity: a, on top of the picture's own transparency.
        row, column: of the picture's upper left pixel; None: the lower right corner.
        content: fingerprint of the file, which makes another picture another config.

    Raises:
        ConfigError: the picture would leave the image.
        DataError: the file is missing or no readable image.
    """

    pattern: Tensor
    mask: Tensor

    def __init__(
        self,
        *,
        path: str,
        opacity: Fraction,
        row: Place,
        column: Place,
        content: str = "",
        **options: Unpack[Poisoning],
    ) -> None:
        super().__init__(**options)
        del content
        canvas = self.spec.image_size
        picture = unpack(
            f"attack.path={path}", image_bytes(Path(path).expanduser(), "attack.path"), "RGBA"
        )
        if max(picture.size) > canvas:
            picture = picture.resize((canvas, canvas), Image.Resampling.BILINEAR)
        size = {"row": picture.height, "column": picture.width}
        corner = {"row": row, "column": column}
        for name, given in corner.items():
            if (given or 0) + size[name] > canvas:
                raise got(f"attack.{name}", given, f"at most {canvas - size[name]} for {path}")
        top, left = (canvas - size[k] if v is None else v for k, v in corner.items())
        inside = (slice(None), slice(top, top + picture.height), slice(left, left + picture.width))
        colours = picture.convert("RGB" if self.spec.channels == 3 else "L")
        pattern, mask = torch.zeros(self.spec.shape), torch.zeros(1, canvas, canvas)
        pattern[inside] = pil_to_tensor(colours) / 255
        mask[inside] = pil_to_tensor(picture.getchannel("A")) / 255 * opacity
        self.register_buffer("pattern", pattern)
        self.register_buffer("mask", mask)

    def trigger(self, x: Tensor) -> Tensor:
        return (1 - self.mask) * x + self.mask * self.pattern
