"""Where the pixels of an image go: mirrored, turned, cut out, resized, padded."""

from dataclasses import dataclass

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

PADDING = 128  # the grey around a shrunken image, as in HQ-SAM


@dataclass(frozen=True, slots=True)
class Move:
    """Where each pixel goes: decided once, then done to the image and to every mask alike.

    After the flips and the `quarters` of a turn, counter-clockwise, the `window` (top, left, rows,
    columns) is resized to `size` (rows, columns), and padded to the canvas.
    """

    mirror: bool
    upend: bool
    quarters: int
    window: tuple[int, int, int, int]
    size: tuple[int, int]
    canvas: tuple[int, int]

    def rests(self, height: int, width: int) -> bool:
        """Whether every pixel of an image of `height` x `width` stays where it is."""
        still = not (self.mirror or self.upend or self.quarters)
        return still and self.window == (0, 0, height, width) and self.size == self.canvas == (height, width)

    def transform(self, height: int, width: int) -> tuple[float, float, float, float, float, float]:
        """Where a place of an image of `height` x `width` pixels comes to lie, as in `types.ImageRecord`."""
        matrix = np.eye(3)
        if self.mirror:
            matrix = np.array([[-1, 0, width], [0, 1, 0], [0, 0, 1]]) @ matrix
        if self.upend:
            matrix = np.array([[1, 0, 0], [0, -1, height], [0, 0, 1]]) @ matrix
        for _ in range(self.quarters):
            matrix = np.array([[0, 1, 0], [-1, 0, width], [0, 0, 1]]) @ matrix
            height, width = width, height
        top, left, rows, columns = self.window
        scale_y, scale_x = self.size[0] / rows, self.size[1] / columns
        matrix = np.array([[scale_x, 0, -left * scale_x], [0, scale_y, -top * scale_y], [0, 0, 1]]) @ matrix
        a, b, c, d, e, f = (matrix[:2].ravel() + 0.0).tolist()  # a zero has no sign then
        return a, b, c, d, e, f

    def apply(self, picture: tv_tensors.TVTensor) -> tv_tensors.TVTensor:
        if self.mirror:
            picture = transforms.horizontal_flip(picture)
        if self.upend:
            picture = transforms.vertical_flip(picture)
        if self.quarters:
            picture = transforms.rotate(picture, 90 * self.quarters, expand=True)
        if self.window != (0, 0, *picture.shape[-2:]):
            picture = transforms.crop(picture, *self.window)
        if self.size != self.window[2:]:
            picture = _resize(picture, self.size)
        if self.size != self.canvas:
            right, below = self.canvas[1] - self.size[1], self.canvas[0] - self.size[0]
            fill = 0 if isinstance(picture, tv_tensors.Mask) else PADDING
            picture = transforms.pad(picture, [0, 0, right, below], fill=fill)
        return picture


def as_picture(image: np.ndarray) -> tv_tensors.Image:
    """An image (H, W, 3), uint8, as torchvision moves it; PyTorch takes neither read-only nor mirrored arrays."""
    return tv_tensors.Image(torch.from_numpy(np.require(image, requirements="CW")).permute(2, 0, 1))


def as_array(picture: tv_tensors.Image) -> np.ndarray:
    """The inverse of `as_picture`."""
    return np.ascontiguousarray(picture.permute(1, 2, 0).numpy())


def zoom(
    canvas: tuple[int, int], scale: float, down: float, across: float
) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
    """Window and size of a `Move` that scales a picture and keeps its canvas, as large-scale jittering does.

    `down` and `across`, in [0, 1), say where the crop of an enlarged picture lies; a smaller one is to be
    padded.
    """
    if scale < 1:
        return (0, 0, *canvas), _scaled(canvas, scale)
    # A crop of the enlarged image, to a fraction of a pixel, without ever making that: it would
    # cost the square of the scale, for the image and for each mask.
    rows, columns = _scaled(canvas, 1 / scale)
    return (int(down * (canvas[0] - rows + 1)), int(across * (canvas[1] - columns + 1)), rows, columns), canvas


def _scaled(canvas: tuple[int, int], scale: float) -> tuple[int, int]:
    return max(1, round(canvas[0] * scale)), max(1, round(canvas[1] * scale))


def _resize(picture: tv_tensors.TVTensor, size: tuple[int, int]) -> tv_tensors.TVTensor:
    """The image with antialiasing; of a mask the value at the middle of each new pixel.

    torchvision's "nearest" takes the upper left corner instead, and so shifts a mask against its image by
    up to half a pixel. In its older releases masks know nothing else; plain tensors always did.
    """
    if isinstance(picture, tv_tensors.Mask):
        plain = picture.as_subclass(torch.Tensor)
        return tv_tensors.wrap(transforms.resize(plain, size, InterpolationMode.NEAREST_EXACT), like=picture)
    # Colours side by side: PyTorch's fast path, and the other one fails where a single pixel is left (2.15).
    interleaved = tv_tensors.wrap(picture.permute(1, 2, 0).contiguous().permute(2, 0, 1), like=picture)
    return transforms.resize(interleaved, size, InterpolationMode.BILINEAR, antialias=True)
