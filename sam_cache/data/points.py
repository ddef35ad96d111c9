"""The points of an object that need no chance: the same for everyone, computed once.

A point (x, y) is the column and the row of a pixel, as `SamPredictor` is given them.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from sam_cache.data.crops import crop_rle


@dataclass(frozen=True, slots=True)
class DeterministicPoints:
    """Three points of one object; each is a pixel (x, y) of the image and lies in the mask.

    `centroid_xy_image` is the pixel that holds the centre of mass, and `bbox_center_xy_image` the one
    that holds the centre of the tight box; a centre on the edge between two pixels belongs to the
    right or lower one. Where that pixel is not in the mask, which is non-convex then, the nearest
    pixel that is takes its place, and `..._moved` says so. `interior_xy_image` is the pixel farthest
    from everything outside, where outside begins at the image's border too: the centre by which
    Kirillov et al. 2023 (section 7.1) evaluate SAM. Of equally good pixels, `interior` takes the one
    nearest to the centroid, and all take the uppermost, then the leftmost.
    """

    centroid_xy_image: tuple[int, int]
    centroid_moved: bool
    bbox_center_xy_image: tuple[int, int]
    bbox_center_moved: bool
    interior_xy_image: tuple[int, int]


def deterministic_points(rle: bytes, height: int, width: int) -> DeterministicPoints:
    """The points of an object, given as COCO run-length text that covers at least one pixel.

    `height` and `width` are the image's.
    """
    crop = crop_rle(rle, height, width)
    mask = crop.mask
    rows, columns = mask.shape
    centroid, center = _centroid(mask), (columns // 2, rows // 2)
    centroid_moved, center_moved = (not mask[y, x] for x, y in (centroid, center))

    def to_image(point: tuple[int, int]) -> tuple[int, int]:
        return point[0] + crop.left, point[1] + crop.top

    return DeterministicPoints(
        centroid_xy_image=to_image(_nearest(mask, centroid) if centroid_moved else centroid),
        centroid_moved=centroid_moved,
        bbox_center_xy_image=to_image(_nearest(mask, center) if center_moved else center),
        bbox_center_moved=center_moved,
        interior_xy_image=to_image(_interior(mask, centroid)),
    )


def _centroid(mask: np.ndarray) -> tuple[int, int]:
    """floor(mean + 1/2) of the pixels' columns and rows, in integers: exact at any size."""
    per_column, per_row = (cv2.reduce(mask, axis, cv2.REDUCE_SUM, dtype=cv2.CV_32S).ravel() for axis in (0, 1))
    area = int(per_column.sum())
    x, y = (int(np.dot(np.arange(len(counts)), counts)) for counts in (per_column, per_row))
    return (2 * x + area) // (2 * area), (2 * y + area) // (2 * area)


def _interior(mask: np.ndarray, centroid: tuple[int, int]) -> tuple[int, int]:
    framed = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    distance = cv2.distanceTransform(framed, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
    # OpenCV's last bits change from call to call; the square of a distance between pixels is a whole number.
    squared = np.rint(np.square(distance, dtype=np.float64))
    return _nearest(squared == squared.max(), centroid)


def _nearest(inside: np.ndarray, point: tuple[int, int]) -> tuple[int, int]:
    """The pixel where `inside` (h, w) is true that is nearest to `point`."""
    rows, columns = np.divmod(np.flatnonzero(inside), inside.shape[1])
    best = np.argmin((columns - point[0]) ** 2 + (rows - point[1]) ** 2)
    return int(columns[best]), int(rows[best])
