"""Convert decoded pictures of any kind to 8-bit pixels: one rule for all readers."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

ORIENTATION = 0x0112
"""EXIF tag."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture of this orientation upright."""
WHITE_IS_ZERO = 0
"""Of a TIFF file's ``PHOTOMETRIC``; Pillow turns such pixels over only if they have 8 bits."""
PHOTOMETRIC, SAMPLE_FORMAT = 262, 339
"""TIFF tags."""
SIGNED = 2
"""Of a TIFF file's ``SAMPLE_FORMAT``; Pillow reads such bytes as unsigned ones."""
UNREADABLE_EXIF = (OSError, ValueError, KeyError, TypeError, SyntaxError, struct.error)
Say = Callable[[str], None]
"""Takes a remark on one picture, for the notes of a run."""


def unsaid(remark: str) -> None:
    """Ignore the message."""
    del remark


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """Options of the conversion from pictures to pixels.

    Attributes:
        exif_orientation: turn pictures upright as their EXIF data says.
        background: RGB colour, 0 to 255, that shows through transparent parts.
    """

    exif_orientation: bool = True
    background: tuple[int, ...] = (255, 255, 255)

    def __call__(self, picture: Image.Image, mode: str, say: Say = unsaid) -> Image.Image:
        """The opened picture in ``mode``, one of L, LA, RGB, RGBA; the last letter keeps alpha.

        Raises:
            ValueError: pixels of a type whose range is not known.
        """
        _refuse_misread(picture)
        turn = _orientation(picture)
        image = _eight_bits(picture, say)
        if turn in TURNS:
            image = self._upright(image, turn, say)
        if image.has_transparency_data and not mode.endswith("A"):
            image = self._opaque(image, say)
        return image.convert(mode)

    def _upright(self, image: Image.Image, turn: int, say: Say) -> Image.Image:
        if self.exif_orientation:
            say("turned upright as EXIF says (data.exif_orientation=false: left as stored)")
            return image.transpose(TURNS[turn])
        say("left as stored, though EXIF says otherwise (data.exif_orientation=false)")
        return image

    def _opaque(self, image: Image.Image, say: Say) -> Image.Image:
        covered = image.convert("RGBA")
        if covered.getchannel("A").getextrema() == (255, 255):
            return covered
        say(f"with transparent parts put over data.background={list(self.background)}")
        under = Image.new("RGBA", covered.size, (*self.background, 255))
        return Image.alpha_composite(under, covered)


def _refuse_misread(picture: Image.Image) -> None:
    """What Pillow would read wrongly, without a word; to be asked before it is loaded.

    Raises:
        ValueError: signed integers, or 16 bits of which one colour is transparent.
    """
    if SIGNED in np.atleast_1d(getattr(picture, "tag_v2", {}).get(SAMPLE_FORMAT, 1)):
        raise ValueError("signed integers, whose range is not known; save it with 8 or 16 bits")
    if "transparency" in picture.info and any(
        ";16" in str(part[3]) for part in getattr(picture, "tile", ())
    ):
        raise ValueError("16 bits and a transparent colour; save it with an alpha channel")


def _orientation(picture: Image.Image) -> int:
    """What EXIF says, 1 to 8; taken out, because Pillow turns TIFF files by itself."""
    try:
        return int(picture.getexif().pop(ORIENTATION, 1))
    except UNREADABLE_EXIF:
        return 1


def _eight_bits(picture: Image.Image, say: Say) -> Image.Image:
    """Pixels of more bits, scaled by the range of their type: 65535 or 1.0 becomes 255.

    Pillow's own conversion cuts off whatever is larger than 255.

    Raises:
        ValueError: pixels of a type whose range is not known.
    """
    wide = picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format != "TIFF")
    if wide:
        say("scaled from 16 to 8 bits")
        values = np.asarray(picture, dtype=np.float64) / 257
    elif picture.mode == "F":
        values = np.asarray(picture, dtype=np.float64)
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"floats from {low:g} to {high:g}, expected 0 to 1; save it with 8 or 16 bits"
            )
        say("scaled from floats in 0 to 1")
        values = values * 255
    elif picture.mode == "I":
        raise ValueError("32-bit integers, whose range is not known; save it with 8 or 16 bits")
    else:
        picture.load()
        return picture
    if getattr(picture, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO:
        values = 255 - values
    return Image.fromarray(np.rint(values).astype(np.uint8))


AS_USUAL = Pixels()
