"""What several networks answer, side by side on one image."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from sam_cache.pictures.overlay import draw_overlay
from sam_cache.pictures.text import measure_text, write_text

INK, FAINT, PAPER = (25, 25, 25), (110, 110, 110), 255


def comparison(
    image: np.ndarray,
    truth: Sequence[np.ndarray],
    answers: Mapping[str, Sequence[np.ndarray]],
    points_xy_image: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    boxes_xyxy_image: np.ndarray | None = None,
    ious: Mapping[str, float] = MappingProxyType({}),
    title: str = "",
    size: int = 480,
) -> np.ndarray:
    """Panels: image and prompts | ground truth | one for each of `answers`, by its name; an RGB uint8 picture.

    Arguments are those of `draw_overlay`; mask n has one colour in all panels. The IoUs, shown in
    the captions, are whatever the caller means by them (the mean over the masks, as a rule).
    `size` is the longest side of a panel in pixels.
    """
    pictures = [
        draw_overlay(image, (), points_xy_image, labels, boxes_xyxy_image, size=size),
        *(draw_overlay(image, masks, size=size) for masks in (truth, *answers.values())),
    ]
    captions = [("image and prompts", ""), ("ground truth", "")]
    captions += [(name, f"IoU {ious[name]:.3f}" if name in ious else "") for name in answers]
    letters = max(13, size // 26)
    gap, line = letters, measure_text("", letters)[1]
    caption_height = 2 * line + gap // 2
    top = gap + (line + gap if title else 0)

    height, width = pictures[0].shape[:2]
    text_width = max(measure_text(text, letters, bold=True)[0] for pair in captions for text in pair)
    cell = max(width, text_width)  # a very tall image is narrower than its caption
    total_width = max(len(pictures) * (cell + gap) + gap, measure_text(title, letters, bold=True)[0] + 2 * gap)
    page = np.full((top + height + caption_height + gap, total_width, 3), PAPER, np.uint8)

    if title:
        write_text(page, title, gap, gap, letters, INK, bold=True)
    for number, (picture, (name, note)) in enumerate(zip(pictures, captions, strict=True)):
        left = gap + number * (cell + gap)
        inset = left + (cell - width) // 2
        page[top : top + height, inset : inset + width] = picture
        write_text(page, name, left, top + height + gap // 2, letters, INK, bold=True)
        write_text(page, note, left, top + height + gap // 2 + line, letters, FAINT)
    return page
