"""How well one mask matches another, at the image's own resolution.

Masks are boolean (H, W) arrays of one shape. Two empty masks match perfectly: 1. One empty mask
matches nothing: 0.
"""

import cv2
import numpy as np


def mask_iou(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union, in pixels."""
    union = np.count_nonzero(predicted | truth)
    return np.count_nonzero(predicted & truth) / union if union else 1.0


def dice(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Twice the intersection over the sum of areas (the F1 score of pixels)."""
    areas = np.count_nonzero(predicted) + np.count_nonzero(truth)
    return 2 * np.count_nonzero(predicted & truth) / areas if areas else 1.0


def boundary_iou(predicted: np.ndarray, truth: np.ndarray, dilation_ratio: float = 0.02) -> float:
    """IoU of the masks' boundaries: their pixels within d of their contours (Cheng et al. 2021).

    d is `dilation_ratio` of the image's diagonal, rounded, at least 1 pixel; the image's border
    counts as contour. Equal to `mask_to_boundary` of bowenc0221/boundary-iou-api, but computed on
    the box around both masks only: outside of it all is zero, just as the frame of zeros which that
    function adds around the image.
    """
    height, width = truth.shape
    distance = max(1, round(dilation_ratio * float(np.hypot(height, width))))
    x, y, w, h = cv2.boundingRect((predicted | truth).view(np.uint8))
    box = slice(y, y + h), slice(x, x + w)
    return mask_iou(_boundary(predicted[box], distance), _boundary(truth[box], distance))


def _boundary(mask: np.ndarray, distance: int) -> np.ndarray:
    framed = cv2.copyMakeBorder(mask.view(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    inner = cv2.erode(framed, np.ones((3, 3), np.uint8), iterations=distance)
    return mask & ~inner[1:-1, 1:-1].astype(bool)
