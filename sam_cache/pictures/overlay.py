"""An image with masks laid over it and the prompts that asked for them."""

from collections.abc import Sequence

import cv2
import numpy as np

from sam_cache.pictures.text import measure_text, write_text

# Okabe and Ito's colours, told apart with any colour vision (jfly.uni-koeln.de/color), strongest first.
PALETTE = (
    (86, 180, 233),
    (230, 159, 0),
    (0, 158, 115),
    (204, 121, 167),
    (240, 228, 66),
    (213, 94, 0),
    (0, 114, 178),
)
FILL = 0.4  # opacity inside a mask; its contour is opaque
DARK, WHITE, NEGATIVE = (20, 20, 20), (255, 255, 255), (213, 94, 0)
SUBPIXELS = 4  # bits behind the point in OpenCV's drawing coordinates


def draw_overlay(
    image: np.ndarray,
    masks: Sequence[np.ndarray] = (),
    points_xy_image: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    boxes_xyxy_image: np.ndarray | None = None,
    title: str = "",
    size: int | None = None,
) -> np.ndarray:
    """Draw boolean (H, W) masks and prompts over an RGB uint8 (H, W, 3) image; returns a new one.

    `points_xy_image` is (K, 2) with `labels` (K,): a star is foreground (the default), a dot is
    background. `boxes_xyxy_image` is (B, 4). Mask n has the n-th colour of `PALETTE`, cyclically.
    `size` is the longest side of the result in pixels; None keeps the image's size.
    """
    height, width = image.shape[:2]
    scale = 1.0 if size is None else size / max(height, width)
    shape = max(1, round(width * scale)), max(1, round(height * scale))
    canvas = _resize(image, shape) if shape != (width, height) else image.copy()
    stroke = max(1.0, max(shape) / 400)  # pixels

    for number, mask in enumerate(masks):
        _lay(canvas, mask, PALETTE[number % len(PALETTE)], stroke)

    # A point names a pixel, so its middle; a box runs along the pixels' borders. OpenCV counts middles.
    ratio = np.divide(shape, (width, height))
    for box in [] if boxes_xyxy_image is None else np.asarray(boxes_xyxy_image).reshape(-1, 2, 2):
        (x0, y0), (x1, y1) = box * ratio - 0.5
        corners = np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
        line = max(2, round(1.5 * stroke))
        for thickness, colour in ((line + 2, DARK), (line, WHITE)):
            cv2.polylines(canvas, [_fixed(corners)], True, colour, thickness, cv2.LINE_AA, SUBPIXELS)
    if points_xy_image is not None:
        placed = (np.asarray(points_xy_image).reshape(-1, 2) + 0.5) * ratio - 0.5
        kinds = np.ones(len(placed)) if labels is None else labels
        for xy, foreground in zip(placed, kinds, strict=True):
            _mark(canvas, xy, bool(foreground), 5 * stroke)
    if title:
        _label(canvas, title)
    return canvas


def _lay(canvas: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int], stroke: float) -> None:
    """Blend one mask onto the canvas, resized to it: soft-edged fill, and a contour inside its edge."""
    coverage = mask.view(np.uint8) * np.uint8(255)
    if mask.shape != canvas.shape[:2]:
        coverage = _resize(coverage, canvas.shape[1::-1])
    x, y, w, h = cv2.boundingRect(coverage)
    if w == 0:
        return
    coverage = coverage[y : y + h, x : x + w]
    side = 2 * round(stroke) + 1
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    inner = cv2.erode(coverage, disc, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    opacity = (coverage - (1 - FILL) * inner)[..., None] / 255
    patch = canvas[y : y + h, x : x + w]
    patch[:] = np.rint(patch + (np.array(colour) - patch) * opacity)


def _mark(canvas: np.ndarray, xy: np.ndarray, foreground: bool, radius: float) -> None:
    if foreground:
        angles = np.pi * np.arange(10) / 5
        radii = np.where(np.arange(10) % 2, 0.45, 1.0)
        star = np.stack([radii * np.sin(angles), -radii * np.cos(angles)], axis=1)
        for size, colour in ((1.5 * radius, DARK), (radius, WHITE)):
            cv2.fillPoly(canvas, [_fixed(xy + size * star)], colour, cv2.LINE_AA, SUBPIXELS)
    else:
        for size, colour in ((radius, WHITE), (0.7 * radius, NEGATIVE)):
            centre = tuple(int(v) for v in _fixed(xy))
            cv2.circle(canvas, centre, int(size * 2**SUBPIXELS), colour, -1, cv2.LINE_AA, SUBPIXELS)


def _label(canvas: np.ndarray, title: str) -> None:
    """The title in the top left corner, on a dark see-through plate."""
    letters = max(10, min(canvas.shape[:2]) // 24)
    width, height = measure_text(title, letters)
    plate = canvas[: height + letters // 2, : width + letters]
    plate[:] = plate * 0.35
    write_text(canvas, title, letters // 2, letters // 4, letters, WHITE)


def _resize(picture: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    shrinks = shape[0] < picture.shape[1]
    return cv2.resize(picture, shape, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


def _fixed(xy: np.ndarray) -> np.ndarray:
    return np.rint(xy * 2**SUBPIXELS).astype(np.int32)
