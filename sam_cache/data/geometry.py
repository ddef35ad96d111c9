"""Where a pixel of the image lies in the encoder's square input, and back.

The arithmetic is that of `segment_anything/utils/transforms.py`: coordinates are multiplied by the
resized side over the original side, x and y apart, because each side is rounded by itself.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

Fit = Literal["longest", "squash"]


@dataclass(frozen=True)
class Geometry:
    """How an image of `height` x `width` pixels is laid into a square input of `input_size` pixels.

    `fit="longest"` scales the longest side to `input_size` and leaves padding to the right and below,
    as SAM does. `fit="squash"` stretches both sides, as SAM-Adapter and HQ-SAM's evaluation do.
    """

    height: int
    width: int
    input_size: int
    fit: Fit = "longest"

    @cached_property
    def content_height(self) -> int:
        """Rows of the input that show the image; what lies below is padding."""
        return self._content(self.height)

    @cached_property
    def content_width(self) -> int:
        """Columns of the input that show the image; what lies to the right is padding."""
        return self._content(self.width)

    @cached_property
    def scale_x(self) -> float:
        """Input pixels per image pixel, from left to right."""
        return self.content_width / self.width

    @cached_property
    def scale_y(self) -> float:
        """Input pixels per image pixel, from top to bottom."""
        return self.content_height / self.height

    def points_to_input(self, points_xy_image: np.ndarray) -> np.ndarray:
        """Points (..., 2) as `SamPredictor` is given them, in the input frame; float64."""
        return np.asarray(points_xy_image, np.float64) * self._scale

    def points_to_image(self, points_xy_input: np.ndarray) -> np.ndarray:
        """The inverse of `points_to_input`."""
        return np.asarray(points_xy_input, np.float64) / self._scale

    def boxes_to_input(self, boxes_xyxy_image: np.ndarray) -> np.ndarray:
        """Boxes (..., 4) as (x, y, x + w, y + h), in the input frame; float64."""
        return np.asarray(boxes_xyxy_image, np.float64) * (self._scale * 2)

    def boxes_to_image(self, boxes_xyxy_input: np.ndarray) -> np.ndarray:
        """The inverse of `boxes_to_input`."""
        return np.asarray(boxes_xyxy_input, np.float64) / (self._scale * 2)

    @property
    def _scale(self) -> tuple[float, float]:
        return self.scale_x, self.scale_y

    def _content(self, side: int) -> int:
        if self.fit == "squash":
            return self.input_size
        # Upstream rounds a side below half a pixel to none, and then cannot resize.
        return max(1, int(side * (self.input_size / max(self.height, self.width)) + 0.5))
