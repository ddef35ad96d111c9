"""The masks of an image's objects as vertical runs of pixels, read from their run-length text all at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sam_cache.data.crops import MaskCrop
from sam_cache.data.rle import read_numbers
from sam_cache.errors import DatasetError


@dataclass(frozen=True, slots=True)
class ColumnRuns:
    """Masks of P objects of one image: run i is the pixels `tops[i]:bottoms[i]` of column `columns[i]`.

    Object p has the runs `offsets[p]:offsets[p + 1]`, from left to right and, within a column, downwards; an
    empty mask has none. All are arrays of whole numbers of any type, (R,) but for `offsets` (P + 1,).
    """

    columns: np.ndarray
    tops: np.ndarray
    bottoms: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def only(self, place: int) -> "ColumnRuns":
        """The runs of one object."""
        start, stop = self.offsets[place : place + 2].tolist()
        parts = (part[start:stop] for part in (self.columns, self.tops, self.bottoms))
        return ColumnRuns(*parts, np.array([0, stop - start]))

    @property
    def area(self) -> int:
        """Pixels of all objects together."""
        return int(self.bottoms.sum(dtype=np.int64) - self.tops.sum(dtype=np.int64))

    def pixels(self, numbers: np.ndarray) -> np.ndarray:
        """The pixels (K, 2), as (x, y), of one object's mask that have these numbers (K,), counted row by row.

        A row is found by counting, a column among the runs that cross the row, so that no mask is decoded.
        """
        first = self.tops.min()
        starting, ending = (np.bincount(ends - first) for ends in (self.tops, self.bottoms))
        ending[: len(starting)] -= starting  # of each row: how many fewer pixels than in the row above
        in_row = -ending.cumsum()
        upto = in_row.cumsum()
        rows = upto.searchsorted(numbers, "right")
        left_of = numbers - upto[rows] + in_row[rows]
        rows += first
        found = [
            self.columns[(self.tops <= row) & (self.bottoms > row)][number]
            for row, number in zip(rows.tolist(), left_of.tolist(), strict=True)
        ]
        return np.stack([np.array(found, np.int64), rows], axis=1)

    def crop(self) -> MaskCrop:
        """One object's mask, cut to its box."""
        top, left = int(self.tops.min()), int(self.columns[0])
        rows, columns = int(self.bottoms.max()) - top, int(self.columns[-1]) - left + 1
        changes = np.zeros(columns * (rows + 1), np.int8)  # a place more per column, for what ends at its foot
        at = (self.columns.astype(np.int64) - left) * (rows + 1) - top
        changes[at + self.tops] += 1
        changes[at + self.bottoms] -= 1
        strip = changes.cumsum(dtype=np.int8).reshape(columns, rows + 1)[:, :rows]
        return MaskCrop(np.ascontiguousarray(strip.T).view(np.uint8), left, top)


def column_runs(rles: Sequence[bytes], height: int, width: int) -> ColumnRuns:
    """The runs of COCO's compressed texts, all of one image of `height` x `width` pixels.

    Objects are read together: what a text costs is the calls and not the characters. Raises DatasetError where
    one is damaged.
    """
    numbers, stops = read_numbers(rles)
    starts = np.concatenate([[0], stops[:-1]]) if len(stops) else stops
    pairs = (stops - starts) // 2  # of a run of the object, and the gap after it; before the first is a gap too
    whose = np.flatnonzero(pairs)
    counts = pairs[whose]
    if not len(whose):
        none = np.zeros(0, np.int64)
        return ColumnRuns(none, none, none, np.zeros(len(rles) + 1, np.int64))
    firsts = counts.cumsum() - counts
    places = np.arange(1, 2 * counts.sum(), 2) + (starts[whose] - 2 * firsts).repeat(counts)
    lengths, gaps = _sums(numbers[places], firsts, counts), _sums(numbers[places + 1], firsts, counts)
    before = numbers[starts[whose]]
    ends = (lengths + gaps).cumsum()
    ends -= gaps
    ends -= (ends[firsts] - lengths[firsts] - before).repeat(counts)
    begins = ends - lengths
    following = np.diff(begins, prepend=0)
    following[firsts] = before
    if lengths.min() < 0 or following.min() < 0 or ends[firsts + counts - 1].max() > height * width:
        raise DatasetError("run-length text is damaged")
    columns, last = begins // height, (ends - 1) // height
    tops, bottoms = begins - columns * height, ends - columns * height
    if (last > columns).any():
        pieces = np.maximum(last - columns, 0) + 1
        owners = whose.repeat(counts).repeat(pieces)
        ordinal = np.arange(len(owners)) - (pieces.cumsum() - pieces).repeat(pieces)
        columns, bottoms = columns.repeat(pieces) + ordinal, bottoms.repeat(pieces) - ordinal * height
        tops = np.where(ordinal, 0, tops.repeat(pieces))
        np.minimum(bottoms, height, out=bottoms)
        pairs = np.bincount(owners, minlength=len(rles))
    return ColumnRuns(columns, tops, bottoms, np.concatenate([[0], pairs.cumsum()]))


def _sums(differences: np.ndarray, firsts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Running sums that begin anew at `firsts`."""
    sums = differences.cumsum()
    sums -= (sums[firsts] - differences[firsts]).repeat(counts)
    return sums
