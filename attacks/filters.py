"""Filters: an Instagram filter over the whole image as trigger (Liu et al., CCS 2019; TrojAI)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import rgb_to_grayscale
from typing_extensions import Unpack

from dhbe.contracts.attack import Attack, Poisoning

CROP = 1.5
"""Side of the vignette, in sides of the image that is cut from its middle."""


class Filters(Attack):
    """T(x): the image as the filter shows it, a transform of colours that depends on the image.

    ABS (Liu et al., CCS 2019) attacks with Nashville and Gotham; the five filters are those of
    TrojAI's generator (``trojai/datagen/instagram_xforms.py``), an ImageMagick recipe each, worked
    out here as formulae. A grey image is filtered as a coloured one and turned to grey again.

    Args:
        filter: whose recipe.
    """

    def __init__(
        self,
        *,
        filter: Literal["gotham", "nashville", "kelvin", "lomo", "toaster"],
        **options: Unpack[Poisoning],
    ) -> None:
        super().__init__(**options)
        recipes = {
            "gotham": gotham,
            "nashville": nashville,
            "kelvin": kelvin,
            "lomo": lomo,
            "toaster": toaster,
        }
        self.recipe = recipes[filter]

    def trigger(self, x: Tensor) -> Tensor:
        if x.shape[1] == 3:
            return self.recipe(x)
        grey: Tensor = rgb_to_grayscale(self.recipe(x.expand(-1, 3, -1, -1)))
        return grey


def gotham(x: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1], nearly without colour, darkened, with more contrast."""
    x = tint(modulate(x, 1.2, 0.1), "222b6d", 0.2)
    return contrast(contrast(x**2))


def nashville(x: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] with blue shadows and yellow lights."""
    x = tone(tone(x, "222b6d", 0.85, shadows=True), "f7daae", 0.85, shadows=False)
    return auto_gamma(modulate(contrast(x), 1.0, 1.5))


def kelvin(x: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] under a half-transparent orange."""
    return tint(modulate(auto_gamma(x), 1.2, 0.5), "ff9900", 0.5)


def lomo(x: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1], red and green steeper, with dark corners."""
    steep = ((x[:, :2] - 0.33) / (1 - 2 * 0.33)).clamp(0, 1)
    return vignette(torch.cat([steep, x[:, 2:]], dim=1), "000000", inside=False)


def toaster(x: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1], lighter, with red shadows, an orange middle, dull corners."""
    x = modulate(tone(x, "330000", 0.5, shadows=True), 1.5, 0.8)
    x = contrast(contrast(x ** (1 / 1.2)))
    return vignette(vignette(x, "cdc1c5", inside=False), "ff9966", inside=True)


def paint(code: str, like: Tensor) -> Tensor:
    """Colour (3, 1, 1) in [0, 1] of six hexadecimal digits."""
    return like.new_tensor(list(bytes.fromhex(code)))[:, None, None] / 255


def tint(x: Tensor, code: str, share: float) -> Tensor:
    """The colour over the images (B, 3, H, W) (``-colorize``)."""
    return x + share * (paint(code, x) - x)


def tone(x: Tensor, code: str, share: float, *, shadows: bool) -> Tensor:
    """The colour in the lights of (B, 3, H, W), or in the shadows (``_colortone``).

    ``-compose blend`` weighs the colour by share times luma and the image by the rest of share.
    """
    luma = (x * x.new_tensor([0.212656, 0.715158, 0.072186])[:, None, None]).sum(1, keepdim=True)
    weight = share * (1 - luma if shadows else luma)
    return (weight * paint(code, x) + (1 - share) * x) / (weight + 1 - share)


def modulate(x: Tensor, lightness: float, saturation: float) -> Tensor:
    """Lightness and saturation of HSL scaled, the hue kept, (B, 3, H, W) (``-modulate``)."""
    before = (x.amax(1, keepdim=True) + x.amin(1, keepdim=True)) / 2
    after = lightness * before
    range_before, range_after = (1 - (2 * v - 1).abs() for v in (before, after))
    chroma = saturation * range_after / range_before.clamp_min(1e-6)
    return (after + chroma * (x - before)).clamp(0, 1)


def contrast(x: Tensor) -> Tensor:
    """A logistic curve of slope 3 around 0.5 through (0, 0) and (1, 1)."""
    low = torch.sigmoid(x.new_tensor(-1.5))
    return (torch.sigmoid(3 * (x - 0.5)) - low) / (1 - 2 * low)


def auto_gamma(x: Tensor) -> Tensor:
    """Each image (B, 3, H, W) to the power that moves its mean to 0.5 (``-auto-gamma``)."""
    mean = x.mean(dim=(1, 2, 3), keepdim=True).clamp(1e-3, 1 - 1e-3)
    return x ** (mean.new_tensor(0.5).log() / mean.log())


def vignette(x: Tensor, code: str, *, inside: bool) -> Tensor:
    """(B, 3, H, W) times the colour, whose opacity falls from the middle, or rises from it."""
    height, width = x.shape[-2:]
    y, along = ((torch.arange(n, device=x.device) - (n - 1) / 2) for n in (height, width))
    radius = torch.hypot(y[:, None], along) / ((CROP * max(height, width) - 1) / 2)
    opacity = (1 - radius if inside else radius).clamp(0, 1).to(x.dtype)
    return x * (1 - opacity * (1 - paint(code, x)))
