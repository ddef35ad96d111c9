"""Masks cut down to their boxes, so that the cost of an object goes by its size, not by its image's."""

from dataclasses import dataclass

import numpy as np
from pycocotools import mask as coco_mask

from sam_cache.data.rle import parse_rle


@dataclass(frozen=True)
class MaskCrop:
    """The part `mask` (h, w), uint8 0/1, of an object's mask, whose upper left pixel is (`left`, `top`).

    No pixel outside the crop belongs to the object. A whole mask is a crop at (0, 0).
    """

    mask: np.ndarray
    left: int = 0
    top: int = 0

    @classmethod
    def of(cls, mask: np.ndarray) -> "MaskCrop":
        """The tight box of a boolean mask (H, W), which may be empty; a copy."""
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if not len(rows):
            return cls(np.zeros((0, 0), np.uint8))
        top, left = int(rows[0]), int(columns[0])
        return cls(mask[top : rows[-1] + 1, left : columns[-1] + 1].astype(np.uint8), left, top)

    def within(self, rows: slice, columns: slice) -> "MaskCrop":
        """What of it lies in these rows and columns, still at its place."""
        top, left = max(rows.start, self.top), max(columns.start, self.left)
        below, right = max(0, rows.stop - self.top), max(0, columns.stop - self.left)
        return MaskCrop(self.mask[top - self.top : below, left - self.left : right], left, top)

    def whole(self, height: int, width: int) -> np.ndarray:
        """The boolean mask (`height`, `width`) that it was cut from."""
        mask = np.zeros((height, width), bool)
        rows, columns = self.mask.shape
        mask[self.top : self.top + rows, self.left : self.left + columns] = self.mask
        return mask


def crop_rle(rle: bytes, height: int, width: int) -> MaskCrop:
    """Decode the tight box of an object in an image of `height` x `width` pixels.

    Equals the whole mask cut to its box, without ever making the whole mask: in an image of
    2048 x 12288 pixels that takes 70 ms, the crop of a small object 0.1 ms. `rle` comes from
    `sam_cache.data.rle` and covers at least one pixel.
    """
    left, top, columns, rows = coco_mask.toBbox({"size": [height, width], "counts": rle}).astype(int).tolist()
    # Runs go down one column after the other, so the box's columns are one piece of them.
    ends = parse_rle(rle).cumsum().clip(left * height, (left + columns) * height)
    lengths = ends.copy()
    lengths[0] -= left * height
    lengths[1:] -= ends[:-1]
    values = np.zeros(len(ends), np.uint8)
    values[1::2] = 1
    strip = values.repeat(lengths).reshape(columns, height)
    return MaskCrop(np.ascontiguousarray(strip[:, top : top + rows].T), left, top)
