"""Chance in what an image looks like, for training that runs the encoder each time.

Behind a cache there is none of it: embeddings are of the images as they were.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import isfinite

import numpy as np
import torch
from numpy.random import Generator
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from sam_cache.data.rle import mask_to_rle, rle_to_mask
from sam_cache.errors import UsageError

# Each part and what it is when nothing more is said. The range of scales is that of Ghiasi et al. 2021
# ("Simple Copy-Paste", large-scale jittering), and of HQ-SAM's training (train/utils/dataloader.py).
PARTS = {"hflip": 0.5, "vflip": 0.5, "rotate90": True, "jitter": (0.1, 2.0), "colour": 0.2}
FORMS = {"hflip": "hflip:0.3", "vflip": "vflip:0.3", "jitter": "jitter:0.1-2.0", "colour": "colour:0.2"}

NUMBER = r"((?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)"
SYNTAX = {name: re.compile(f"{NUMBER}-{NUMBER}" if name == "jitter" else NUMBER) for name in FORMS}

PADDING = 128  # the grey around a shrunken image, as in HQ-SAM

ADJUSTMENTS = (
    transforms.adjust_brightness,
    transforms.adjust_contrast,
    transforms.adjust_saturation,
    transforms.adjust_hue,
)


@dataclass(frozen=True)
class Augmentation:
    """What may happen to an image; nothing unless said. `str` gives the text that parses to it.

    `hflip` and `vflip` are the probabilities of mirroring left to right and upside down. `rotate90`
    turns by 0 to 3 quarters, equally often. `jitter` (low, high) scales by a factor drawn uniformly,
    and keeps the canvas: the larger image is cropped at random, the smaller one padded to the right
    and below. `colour` is the strength s of torchvision's ColorJitter: factors of brightness, contrast
    and saturation within 1 - s and 1 + s, and the hue turned by up to s / 4 of the circle.

    Raises UsageError for a number that makes no sense.
    """

    hflip: float = 0
    vflip: float = 0
    rotate90: bool = False
    jitter: tuple[float, float] | None = None
    colour: float = 0

    def __post_init__(self):
        for name in ("hflip", "vflip", "colour"):
            if not 0 <= getattr(self, name) <= 1:  # so put that NaN is refused too
                raise UsageError(f"augmentation {name}:{getattr(self, name)}: must be from 0 to 1")
        if self.jitter is not None:
            low, high = self.jitter
            if not (0 < low <= high and isfinite(high)):
                raise UsageError(f"augmentation jitter:{low}-{high}: give the lower scale first, both above 0")

    def __str__(self) -> str:
        def told(name: str, *values: float) -> str:
            # What the defaults would say again is left out, but a range and a strength are worth reading.
            short = name in ("hflip", "vflip") and values == (PARTS[name],)
            return name if short else f"{name}:" + "-".join(repr(float(value)) for value in values)

        parts = [told(name, getattr(self, name)) for name in ("hflip", "vflip") if getattr(self, name)]
        parts += ["rotate90"] * self.rotate90
        parts += [told("jitter", *self.jitter)] if self.jitter else []
        parts += [told("colour", self.colour)] if self.colour else []
        return ",".join(parts) or "none"


def parse_augmentation(text: str) -> Augmentation:
    """Read `none`, or parts such as `hflip,vflip:0.3,rotate90,jitter:0.1-2.0,colour:0.2`.

    A part without a number means `hflip:0.5`, `vflip:0.5`, `jitter:0.1-2.0` or `colour:0.2`.
    Raises UsageError that names the part and what was probably meant.
    """
    if text.strip() == "none":
        return Augmentation()
    chosen = {}
    for part in map(str.strip, text.split(",")):
        name, colon, value = part.partition(":")
        if name == "none":
            raise UsageError(f"augmentation {text!r}: none stands alone; leave out none or the rest")
        if name not in PARTS:
            nearest = get_close_matches(name, [*PARTS, "none"], n=1, cutoff=0)[0]
            raise UsageError(f"augmentation {part!r}: unknown; did you mean {nearest}? Parts: {', '.join(PARTS)}")
        if name in chosen:
            raise UsageError(f"augmentation {part!r}: {name} is given twice; leave one out")
        chosen[name] = _parse_value(part, name, value) if colon else PARTS[name]
    return Augmentation(**chosen)


def _parse_value(part: str, name: str, value: str) -> float | tuple[float, ...]:
    if name not in FORMS:
        raise UsageError(f"augmentation {part!r}: takes no number; write {name}")
    found = SYNTAX[name].fullmatch(value)
    if not found:
        raise UsageError(f"augmentation {part!r}: not a number it can use; write {name}, or such as {FORMS[name]}")
    numbers = tuple(map(float, found.groups()))
    return numbers if len(numbers) > 1 else numbers[0]


def augment(
    image: np.ndarray, masks: Sequence[bytes], random: Generator, augmentation: Augmentation
) -> tuple[np.ndarray, list[bytes], list[int]]:
    """Change an image (H, W, 3), uint8 RGB, and the masks of its objects in the same way.

    `masks` are run lengths at the image's size, as in `ObjectRecord.rle`, each with a pixel at least.
    Returns the new image, the masks that still have one, and their indices in `masks`; the others are
    gone from the picture. Boxes and areas are to be measured anew (`measure_rle`), at the new image's
    height and width: a quarter turn swaps them.

    All chance comes from `random`, the same amount of it whatever the augmentation is, so that a part
    that is turned on leaves what the others do as it was. Where nothing is changed, the new image may be
    the given one.
    """
    height, width = image.shape[:2]
    move, colours = _draw(height, width, random, augmentation)
    # PyTorch takes neither read-only arrays, such as Pillow's, nor mirrored ones.
    pixels = tv_tensors.Image(torch.from_numpy(np.require(image, requirements="CW")).permute(2, 0, 1))
    for adjust, factor in colours:  # before the move, so that the padding keeps its grey
        pixels = adjust(pixels, factor)
    new_image = np.ascontiguousarray(move.apply(pixels).permute(1, 2, 0).numpy())
    if move.rests:
        return new_image, list(masks), list(range(len(masks)))

    kept, new_masks = [], []
    for index, rle in enumerate(masks):  # one after the other: an image may have hundreds
        mask = move.apply(tv_tensors.Mask(torch.from_numpy(rle_to_mask(rle, height, width))[None]))
        if mask.any():
            kept.append(index)
            new_masks.append(mask_to_rle(mask[0].numpy()))
    return new_image, new_masks, kept


@dataclass(frozen=True)
class _Move:
    """Where each pixel goes: drawn once, then done to the image and to every mask alike.

    After the flips and the `quarters` of a turn, counter-clockwise, the `window` (top, left, rows,
    columns) is resized to `size` (rows, columns), and padded to the canvas.
    """

    mirror: bool
    upend: bool
    quarters: int
    window: tuple[int, int, int, int]
    size: tuple[int, int]
    canvas: tuple[int, int]

    @property
    def rests(self) -> bool:
        """Whether every pixel stays where it is."""
        still = not (self.mirror or self.upend or self.quarters)
        return still and self.window == (0, 0, *self.canvas) and self.size == self.canvas

    def apply(self, picture: tv_tensors.TVTensor) -> tv_tensors.TVTensor:
        if self.mirror:
            picture = transforms.horizontal_flip(picture)
        if self.upend:
            picture = transforms.vertical_flip(picture)
        if self.quarters:
            picture = transforms.rotate(picture, 90 * self.quarters, expand=True)
        if self.window != (0, 0, *self.canvas):
            picture = transforms.crop(picture, *self.window)
        if self.size != self.window[2:]:
            picture = _resize(picture, self.size)
        if self.size != self.canvas:
            right, below = self.canvas[1] - self.size[1], self.canvas[0] - self.size[0]
            fill = 0 if isinstance(picture, tv_tensors.Mask) else PADDING
            picture = transforms.pad(picture, [0, 0, right, below], fill=fill)
        return picture


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


def _draw(height: int, width: int, random: Generator, augmentation: Augmentation) -> tuple[_Move, list[tuple]]:
    """The move of an image of `height` x `width` pixels, and its (adjustment, factor)s of colour."""
    mirror, upend, turn, scale, down, across, *strengths = random.random(6 + len(ADJUSTMENTS)).tolist()
    order = random.permutation(len(ADJUSTMENTS)).tolist()

    quarters = int(4 * turn) if augmentation.rotate90 else 0
    canvas = (width, height) if quarters % 2 else (height, width)
    window, size = (0, 0, *canvas), canvas
    if augmentation.jitter:
        low, high = augmentation.jitter
        scale = low + (high - low) * scale
        if scale < 1:
            size = _scaled(canvas, scale)
        else:
            # A crop of the enlarged image, to a fraction of a pixel, without ever making that: it would
            # cost the square of the scale, for the image and for each mask.
            rows, columns = _scaled(canvas, 1 / scale)
            window = (int(down * (canvas[0] - rows + 1)), int(across * (canvas[1] - columns + 1)), rows, columns)
    move = _Move(mirror < augmentation.hflip, upend < augmentation.vflip, quarters, window, size, canvas)

    spans = [augmentation.colour] * 3 + [augmentation.colour / 4]
    middles = [1, 1, 1, 0]
    factors = [middles[i] + spans[i] * (2 * strengths[i] - 1) for i in range(len(ADJUSTMENTS))]
    return move, [(ADJUSTMENTS[i], factors[i]) for i in order] if augmentation.colour else []


def _scaled(canvas: tuple[int, int], scale: float) -> tuple[int, int]:
    return max(1, round(canvas[0] * scale)), max(1, round(canvas[1] * scale))
