"""What a decoder should answer, at its own resolution: how much of each cell the object covers.

The decoder's output of `resolution` x `resolution` cells spans the whole square input, padding
included. A cell's coverage is the part of its area that the object's pixels fill, so that an object
thinner than a cell is faint and not gone; where a binary target is needed, a cell belongs to the
object from 0.5 on.

Where pixels begin and end is rounded to 2**-30 of a cell, once. All sums are of whole numbers then, and
exact: whichever way they are taken gives the same bits, an empty cell is 0 and a full one 1.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sam_cache.data.geometry import Geometry
from sam_cache.data.runs import ColumnRuns, column_runs

BITS = 30  # so that a cell's area still fits an integer of 64 bits
CELL = 1 << BITS


@dataclass(frozen=True, slots=True)
class Patch:
    """Coverage `cells` (rows, columns), float32, of the cells from (`top`, `left`) on; all others are 0."""

    top: int
    left: int
    cells: np.ndarray

    @property
    def box(self) -> tuple[slice, slice]:
        rows, columns = self.cells.shape
        return slice(self.top, self.top + rows), slice(self.left, self.left + columns)


def coverage(rle: bytes, geometry: Geometry, resolution: int) -> np.ndarray:
    """Area coverage (resolution, resolution), float32 in [0, 1], of one mask."""
    target = np.zeros((resolution, resolution), np.float32)
    (patch,) = cover(column_runs([rle], geometry.height, geometry.width), geometry, resolution)
    target[patch.box] = patch.cells
    return target


def cover(runs: ColumnRuns, geometry: Geometry, resolution: int) -> list[Patch]:
    """Area coverage of the masks of one image's objects, each in the box of cells that it touches.

    It is exact for every scale, up and down: the sum over the cells is the mask's area, in cells.

    No pixel is looked at, only the ends of vertical runs: an end changes the coverage of its own cell by a
    part and that of all cells below by the same amount, so it is noted as two differences, which a running
    sum down the columns of all objects turns into coverage.
    """
    drawn = np.flatnonzero(np.diff(runs.offsets))
    patches = [Patch(0, 0, np.zeros((0, 0), np.float32))] * len(runs)
    if not len(drawn):
        return patches
    firsts, counts = runs.offsets[drawn], np.diff(runs.offsets)[drawn]
    cells_per_input = resolution / geometry.input_size
    along_x, start, shares = _axis(geometry.width, geometry.scale_x * cells_per_input)
    along_y, _, _ = _axis(geometry.height, geometry.scale_y * cells_per_input)
    left = along_x[runs.columns[firsts]] >> BITS
    right = -(-along_x[runs.columns[firsts + counts - 1] + 1] >> BITS)
    top = along_y[np.minimum.reduceat(runs.tops, firsts)] >> BITS
    bottom = -(-along_y[np.maximum.reduceat(runs.bottoms, firsts)] >> BITS)
    stride = bottom - top + 1  # a column of cells of a patch, and one place for what ends with it
    sizes = (right - left) * stride
    bases = sizes.cumsum() - sizes

    strides = stride.repeat(counts)
    places = start[runs.columns] * strides
    places += (bases - left * stride - top).repeat(counts)
    shares = shares.take(runs.columns, axis=1)
    count, spans = len(places), len(shares)
    where, change = np.empty((2, spans, 2, 2, count), np.int64)
    for end, (edges, sign) in enumerate(((runs.tops, 1), (runs.bottoms, -1))):
        at = along_y[edges]
        lower = (at & (CELL - 1)) * sign
        for below, part in enumerate((sign * CELL - lower, lower)):
            np.multiply(shares, part, out=change[:, below, end])
        at >>= BITS
        at += places
        for span in range(spans):
            where[span, 0, end] = at
            at += 1
            where[span, 1, end] = at
            at += strides - 1
    total = int(sizes.sum())
    room = total + (spans + 1) * int(stride.max())  # for changes by nothing beyond the last patch
    cells = np.zeros(room, np.int64)
    np.add.at(cells, where.reshape(-1), change.reshape(-1))
    cells = cells[:total].cumsum()  # each column's changes add up to 0, so that the next one begins anew
    flat = np.empty(total, np.float32)
    np.multiply(cells, 1 / CELL**2, out=flat, casting="same_kind")
    layout = (each.tolist() for each in (drawn, bases, stride, left, right, top))
    for place, base, step, first, last, above in zip(*layout, strict=True):
        columns = flat[base : base + (last - first) * step].reshape(last - first, step)
        patches[place] = Patch(above, first, columns[:, :-1].T)
    return patches


def valid_coverage(geometry: Geometry, resolution: int, out: np.ndarray | None = None) -> np.ndarray:
    """Area coverage (resolution, resolution), float32, of the image itself: 1 on it, 0 on the padding.

    It is written to `out` where that is given.
    """
    cells = np.arange(resolution)
    rows, columns = (
        (content * resolution / geometry.input_size - cells).clip(0, 1).astype(np.float32)
        for content in (geometry.content_height, geometry.content_width)
    )
    return np.multiply(rows[:, None], columns, out=out)


@lru_cache(maxsize=64)
def _axis(pixels: int, cells_per_pixel: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the N pixels of one axis: their edges (N + 1,), the first cell that each touches (N,), and shares (S, N).

    A share is how much of that and of each following cell a pixel covers; S is 2 where pixels are smaller than
    cells. Edges and shares are integers, in units of 2**-30 cells.
    """
    edges = np.rint(np.arange(pixels + 1) * (cells_per_pixel * CELL)).astype(np.int64)
    start = edges[:-1] >> BITS
    spans = int(((edges[1:] - 1 >> BITS) - start).max()) + 1
    cells = start + np.arange(spans)[:, None] << BITS
    shares = np.minimum(edges[1:], cells + CELL) - np.maximum(edges[:-1], cells)
    return edges, start, np.maximum(shares, 0)
