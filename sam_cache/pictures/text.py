"""Text on images, in DejaVu Sans, which matplotlib brings: OpenCV has only strokes in ASCII."""

from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont


def measure_text(text: str, height: int, bold: bool = False) -> tuple[int, int]:
    """Width of `text` and height of a line in pixels, at a letter size of `height` pixels."""
    font = _font(height, bold)
    ascent, descent = font.getmetrics()
    return round(font.getlength(text)), ascent + descent


def write_text(
    canvas: np.ndarray,
    text: str,
    x: int,
    y: int,
    height: int,
    colour: tuple[int, int, int],
    bold: bool = False,
) -> None:
    """Write one line onto an RGB uint8 `canvas`, in place, its top left corner at (x, y)."""
    picture = Image.fromarray(canvas)
    ImageDraw.Draw(picture).text((x, y), text, fill=colour, font=_font(height, bold))
    canvas[:] = np.asarray(picture)


@cache
def _font(height: int, bold: bool) -> ImageFont.FreeTypeFont:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", name), height)
