"""Options for user files: class names, table columns, pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, TypedDict

import torch
from annotated_types import Ge, Le
from torch import Tensor

from dhbe.core.errors import got
from dhbe.data.pixels import AS_USUAL, Pixels

Level = Annotated[int, Ge(0), Le(255)]
Keep = Callable[[Tensor], Tensor]
"""Labels (N,) of a whole part -> positions (M,) of the images that are wanted."""


def all_of(labels: Tensor) -> Tensor:
    """Positions (N,), 0 to N - 1, of all labels (N,)."""
    return torch.arange(len(labels))


class ReadingOptions(TypedDict, total=False):
    """Options under ``data.`` of the sets that a user brings.

    Attributes:
        class_names: of all classes in order, or a text file with one name a line; None:
            ``classes.txt`` beside the folders, else the names of the folders.
        exif_orientation: turn images upright as their EXIF data says.
        background: RGB colour, 0 to 255, that shows through transparent parts.
    """

    class_names: list[str] | str | None
    exif_orientation: bool
    background: list[Level]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """``ReadingOptions``, the number of classes (None: not asked), columns of tables; which images.

    Attributes:
        keep: is asked before any image is decoded.
    """

    classes: int | None = None
    class_names: list[str] | str | None = None
    pixels: Pixels = AS_USUAL
    image_column: str | None = None
    label_column: str | None = None
    keep: Keep = all_of


USUAL = Reading()


def pixels(options: ReadingOptions) -> Pixels:
    """The part of the options that speaks of pixels.

    Raises:
        ConfigError: a colour that is none.
    """
    background = tuple(options.get("background", AS_USUAL.background))
    if len(background) != 3:
        raise got("data.background", list(background), "three levels 0..255: red, green, blue")
    upright = options.get("exif_orientation", AS_USUAL.exif_orientation)
    return Pixels(exif_orientation=upright, background=background)
