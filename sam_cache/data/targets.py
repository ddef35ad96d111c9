"""What a decoder should answer, at its own resolution: how much of each cell the object covers.

The decoder's output of `resolution` x `resolution` cells spans the whole square input, padding
included. A cell's coverage is the part of its area that the object's pixels fill, so that an object
thinner than a cell is faint and not gone; where a binary target is needed, a cell belongs to the
object from 0.5 on.
"""

import cv2
import numpy as np

from sam_cache.data.crops import MaskCrop
from sam_cache.data.geometry import Geometry


def coverage(crop: MaskCrop, geometry: Geometry, resolution: int) -> np.ndarray:
    """Area coverage (resolution, resolution), float32 in [0, 1], of a mask.

    It is exact for every scale, up and down: the sum over the cells is the mask's area, in cells. The
    sum over a rectangle is read from the mask's integral image (Crow 1984), which is bilinear between
    the corners of its pixels.
    """
    height, width = crop.mask.shape
    cells_per_input = resolution / geometry.input_size
    rows, row_edges = _cells(crop.top, height, geometry.scale_y * cells_per_input, resolution)
    columns, column_edges = _cells(crop.left, width, geometry.scale_x * cells_per_input, resolution)
    integral = cv2.integral(crop.mask)
    at_corners = _read(_read(integral, row_edges).T, column_edges).T
    pixels = np.diff(np.diff(at_corners, axis=0), axis=1)
    target = np.zeros((resolution, resolution), np.float32)
    target[rows, columns] = (pixels * (geometry.scale_x * geometry.scale_y * cells_per_input**2)).clip(0, 1)
    return target


def valid_coverage(geometry: Geometry, resolution: int) -> np.ndarray:
    """Area coverage (resolution, resolution), float32, of the image itself: 1 on it, 0 on the padding."""
    cells = np.arange(resolution)
    rows, columns = (
        (content * resolution / geometry.input_size - cells).clip(0, 1)
        for content in (geometry.content_height, geometry.content_width)
    )
    return np.outer(rows, columns).astype(np.float32)


def _cells(first: int, length: int, cells_per_pixel: float, resolution: int) -> tuple[slice, np.ndarray]:
    """The cells of one axis that `length` pixels from `first` on touch, and their edges, in pixels from `first`."""
    start = int(first * cells_per_pixel)
    stop = min(int(np.ceil((first + length) * cells_per_pixel)), resolution)
    edges = np.arange(start, stop + 1) / cells_per_pixel - first
    return slice(start, stop), edges.clip(0, length)


def _read(sums: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Rows of `sums` at the fractional places `at`, by linear interpolation; float64."""
    whole = np.minimum(at.astype(np.intp), len(sums) - 2)
    part = (at - whole)[:, None]
    return sums[whole] * (1 - part) + sums[whole + 1] * part
