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
from torchvision.transforms.v2 import functional as transforms

from sam_cache.data.move import Move, as_array, as_picture, zoom
from sam_cache.data.rle import mask_to_rle, rle_to_mask
from sam_cache.errors import UsageError

# Each part and what it is when nothing more is said. The range of scales is that of Ghiasi et al. 2021
# ("Simple Copy-Paste", large-scale jittering), and of HQ-SAM's training (train/utils/dataloader.py).
PARTS = {"hflip": 0.5, "vflip": 0.5, "rotate90": True, "jitter": (0.1, 2.0), "colour": 0.2}
FORMS = {"hflip": "hflip:0.3", "vflip": "vflip:0.3", "jitter": "jitter:0.1-2.0", "colour": "colour:0.2"}

NUMBER = r"((?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)"
SYNTAX = {name: re.compile(f"{NUMBER}-{NUMBER}" if name == "jitter" else NUMBER) for name in FORMS}

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
    pixels = as_picture(image)
    for adjust, factor in colours:  # before the move, so that the padding keeps its grey
        pixels = adjust(pixels, factor)
    new_image = as_array(move.apply(pixels))
    if move.rests(height, width):
        return new_image, list(masks), list(range(len(masks)))

    kept, new_masks = [], []
    for index, rle in enumerate(masks):  # one after the other: an image may have hundreds
        mask = move.apply(tv_tensors.Mask(torch.from_numpy(rle_to_mask(rle, height, width))[None]))
        if mask.any():
            kept.append(index)
            new_masks.append(mask_to_rle(mask[0].numpy()))
    return new_image, new_masks, kept


def _draw(height: int, width: int, random: Generator, augmentation: Augmentation) -> tuple[Move, list[tuple]]:
    """The move of an image of `height` x `width` pixels, and its (adjustment, factor)s of colour."""
    mirror, upend, turn, scale, down, across, *strengths = random.random(6 + len(ADJUSTMENTS)).tolist()
    order = random.permutation(len(ADJUSTMENTS)).tolist()

    quarters = int(4 * turn) if augmentation.rotate90 else 0
    canvas = (width, height) if quarters % 2 else (height, width)
    window, size = (0, 0, *canvas), canvas
    if augmentation.jitter:
        low, high = augmentation.jitter
        window, size = zoom(canvas, low + (high - low) * scale, down, across)
    move = Move(mirror < augmentation.hflip, upend < augmentation.vflip, quarters, window, size, canvas)

    spans = [augmentation.colour] * 3 + [augmentation.colour / 4]
    middles = [1, 1, 1, 0]
    factors = [middles[i] + spans[i] * (2 * strengths[i] - 1) for i in range(len(ADJUSTMENTS))]
    return move, [(ADJUSTMENTS[i], factors[i]) for i in order] if augmentation.colour else []
