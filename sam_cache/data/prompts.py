"""One sampler of prompts for training and evaluation.

Chance is keyed by (seed, epoch, image, object): an object is asked for in the same way whatever
batch, position or process it comes up in, and whatever is asked for beside it.
"""

import re
from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import accumulate

import numpy as np
import torch
from numpy.random import Generator, Philox

from sam_cache.data.crops import MaskCrop
from sam_cache.data.geometry import Geometry
from sam_cache.data.noise_masks import degrade_mask
from sam_cache.errors import UsageError
from sam_cache.types import Prompts

# The order is fixed: `Prompts.kind` indexes it.
KINDS = ("centroid", "bbox-center", "interior", "point", "box", "none", "noise-mask")

POINT_COLUMNS = {
    "centroid": "centroid_xy_image",
    "bbox-center": "bbox_center_xy_image",
    "interior": "interior_xy_image",
}

# Noise of a box while training: up to 10% of the side and never more than 20 input pixels, uniform as
# in sam2's training code (sample_box_points in training/utils; Kirillov et al. 2023, appendix A, give
# a standard deviation of 10%).
BOX_NOISE, BOX_NOISE_LIMIT = 0.1, 20.0

# Background points are drawn near the object, from its box with this much of its side around it.
BACKGROUND_MARGIN = 0.1

SYNTAX = re.compile(r"([a-z-]*[a-z])(?:\+(\d{1,4}))?(?:-(\d{1,4}))?(?::(\d+\.?\d*|\.\d+))?")


@dataclass(frozen=True)
class PromptChoice:
    """One of `KINDS` and how often it is drawn, relative to the other choices.

    `foreground` and `background` count the points of kind `point`; other kinds ignore them.
    """

    kind: str
    weight: float = 1.0
    foreground: int = 1
    background: int = 0

    def __str__(self) -> str:
        points = f"+{self.foreground}" * (self.foreground != 1) + f"-{self.background}" * (self.background != 0)
        return self.kind + points + f":{self.weight:g}" * (self.weight != 1)


@dataclass(frozen=True)
class PromptMixture:
    """Choices, one of which is drawn for each object. `str` gives the text that parses to it."""

    choices: tuple[PromptChoice, ...]

    def __str__(self) -> str:
        return ",".join(map(str, self.choices))

    @property
    def kinds(self) -> tuple["PromptMixture", ...]:
        """Each choice by itself, without its weight: what evaluation asks for one after the other."""
        return tuple(
            PromptMixture((PromptChoice(choice.kind, 1.0, choice.foreground, choice.background),))
            for choice in self.choices
        )

    def choose(self, chance: float) -> PromptChoice:
        """The choice that `chance` in [0, 1) falls on."""
        bounds = list(accumulate(choice.weight for choice in self.choices))
        return self.choices[bisect(bounds[:-1], chance * bounds[-1])]


def parse_prompts(text: str) -> PromptMixture:
    """Read `KIND[+K][-N][:WEIGHT],...`, such as `box`, `box:2,centroid` or `point+3-1`.

    `+K` and `-N` say that `point` means K foreground and N background points. Raises UsageError.
    """
    return PromptMixture(tuple(_parse_choice(part.strip()) for part in text.split(",")))


def _parse_choice(text: str) -> PromptChoice:
    parts = SYNTAX.fullmatch(text)
    kind = parts[1] if parts else re.split(r"[+:\d]", text)[0]
    if kind not in KINDS:
        nearest = get_close_matches(kind, KINDS, n=1, cutoff=0)[0]
        raise UsageError(f"prompt {text!r}: unknown kind; did you mean {nearest}? Kinds: {', '.join(KINDS)}")
    if not parts:
        raise UsageError(
            f"prompt {text!r}: write KIND or KIND:WEIGHT, such as box:2; point+3-1 is 3 points and 1 outside"
        )
    foreground, background, weight = int(parts[2] or 1), int(parts[3] or 0), float(parts[4] or 1)
    if (parts[2] or parts[3]) and kind != "point":
        raise UsageError(f"prompt {text!r}: only point can be given numbers of points; write {kind}")
    if not foreground or not weight:
        raise UsageError(f"prompt {text!r}: the number of points and the weight must be above 0; leave it out instead")
    return PromptChoice(kind, weight, foreground, background)


def sample_prompts(
    mixture: PromptMixture,
    objects: Mapping[str, np.ndarray],
    image_index: Sequence[int],
    image_ids: Sequence[int],
    geometries: Sequence[Geometry],
    crop_of: Callable[[int], MaskCrop],
    coverage_of: Callable[[int], np.ndarray],
    *,
    seed: int,
    epoch: int = 0,
    training: bool,
) -> Prompts:
    """One prompt for each of P objects.

    `objects` holds P rows of the columns `id`, `box_xywh_image`, and `centroid_xy_image`,
    `bbox_center_xy_image` and `interior_xy_image` as `deterministic_points` makes them.
    `image_index[p]` names object p's image in `image_ids` and `geometries`. `crop_of(p)` gives its
    mask and is called for the kind `point` only; `coverage_of(p)`, its coverage (h, w) of the decoder's
    cells, for the kind `noise-mask` only. `training` turns the noise of boxes on.

    Foreground points are drawn uniformly from the mask without repetition; an object of fewer pixels
    gets as many points as it has pixels. Background points come from outside the mask but near its
    box, or from the whole image where there are too few of those; a mask that fills the image has none.
    An object so small that nothing is left of its `noise-mask` is asked for by its box instead, and its
    `kind` says so.
    """
    count = len(image_index)
    kinds = np.zeros(count, np.int64)
    boxes = np.zeros((count, 4), np.float64)
    has_box = np.zeros(count, bool)
    points, labels = [np.zeros((0, 2))], [np.zeros(0, np.int64)]
    counts = np.zeros(count + 1, np.int64)
    masks: dict[int, np.ndarray] = {}
    chance = np.zeros((count, 2), np.float32)
    for p, image in enumerate(image_index):
        geometry = geometries[image]
        random = keyed_generator(seed, epoch, image_ids[image], objects["id"][p])
        choice = mixture.choose(random.random())
        kind = choice.kind
        if kind == "noise-mask":
            degraded = degrade_mask(coverage_of(p), random)
            if degraded is None:
                kind = "box"
            else:
                masks[p] = degraded
        kinds[p] = KINDS.index(kind)
        if kind == "box":
            x, y, w, h = objects["box_xywh_image"][p]
            boxes[p] = geometry.boxes_to_input(np.array([x, y, x + w, y + h]))
            if training:
                boxes[p] = jitter_box(boxes[p], geometry, random)
            has_box[p] = True
        elif kind == "point":
            inside, outside = sample_points(crop_of(p), geometry, choice.foreground, choice.background, random)
            points += [geometry.points_to_input(inside), geometry.points_to_input(outside)]
            labels += [np.ones(len(inside), np.int64), np.zeros(len(outside), np.int64)]
            counts[p + 1] = len(inside) + len(outside)
        elif kind in POINT_COLUMNS:
            points.append(geometry.points_to_input(objects[POINT_COLUMNS[kind]][p])[None])
            labels.append(np.ones(1, np.int64))
            counts[p + 1] = 1
        chance[p] = random.random(2, np.float32)  # last, so that the prompt does not depend on it
    return Prompts(
        image_index=torch.tensor(image_index, dtype=torch.int64),
        kind=torch.from_numpy(kinds),
        points_xy_input=torch.from_numpy(np.concatenate(points)).float(),
        labels=torch.from_numpy(np.concatenate(labels)),
        offsets=torch.from_numpy(counts.cumsum()),
        boxes_xyxy_input=torch.from_numpy(boxes).float(),
        has_box=torch.from_numpy(has_box),
        has_mask=torch.tensor([p in masks for p in range(count)], dtype=torch.bool),
        chance=torch.from_numpy(chance),
        masks=_stack(masks, count),
    )


def _stack(masks: Mapping[int, np.ndarray], count: int) -> torch.Tensor | None:
    """The masks of some of `count` prompts as one tensor, zeros for the others; None where none has one."""
    if not masks:
        return None
    stacked = np.zeros((count, *next(iter(masks.values())).shape), np.float32)
    for p, mask in masks.items():
        stacked[p] = mask
    return torch.from_numpy(stacked)


def keyed_generator(seed: int, epoch: int, image_id: int, object_id: int) -> Generator:
    """Random numbers that belong to one object in one epoch.

    The four numbers are the key and the upper half of the counter of Philox (Salmon et al. 2011), so
    no two objects share a stream: nothing is hashed, nothing collides.
    """
    words = [int(number) % 2**64 for number in (seed, image_id, epoch, object_id)]
    key, counter = np.array(words[:2], np.uint64), np.array([0, 0, *words[2:]], np.uint64)
    return Generator(Philox(key=key, counter=counter))


def jitter_box(box_xyxy_input: np.ndarray, geometry: Geometry, random: Generator) -> np.ndarray:
    """Move each side of a box (4,) by itself, within the image; opposite sides keep 80% of their distance."""
    sides = np.tile(box_xyxy_input[2:] - box_xyxy_input[:2], 2)
    noise = random.uniform(-1, 1, 4) * np.minimum(BOX_NOISE * sides, BOX_NOISE_LIMIT)
    size = (geometry.content_width, geometry.content_height)
    return (box_xyxy_input + noise).clip(0, size + size)


def sample_points(
    crop: MaskCrop, geometry: Geometry, foreground: int, background: int, random: Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Points (K, 2) in and (N, 2) outside of a mask, float64 (x, y) in the image, K and N at most as asked for."""
    inside = _draw(crop.mask.astype(bool), crop.left, crop.top, foreground, random)
    if not background:
        return inside, np.zeros((0, 2))
    rows, columns = crop.mask.shape
    window = _around(crop, geometry, max(1, int(BACKGROUND_MARGIN * columns)), max(1, int(BACKGROUND_MARGIN * rows)))
    if window.mask.size - np.count_nonzero(window.mask) < background:
        window = _around(crop, geometry, geometry.width, geometry.height)
    return inside, _draw(window.mask == 0, window.left, window.top, background, random)


def _draw(allowed: np.ndarray, left: int, top: int, count: int, random: Generator) -> np.ndarray:
    """At most `count` different pixels of those allowed, as (x, y)."""
    places = np.flatnonzero(allowed)
    rows, columns = np.divmod(random.choice(places, min(count, len(places)), replace=False), allowed.shape[1])
    return np.stack([columns + left, rows + top], axis=1).astype(np.float64)


def _around(crop: MaskCrop, geometry: Geometry, margin_x: int, margin_y: int) -> MaskCrop:
    """The crop with so many pixels more on each side, as far as the image goes."""
    rows, columns = crop.mask.shape
    left, above = min(crop.left, margin_x), min(crop.top, margin_y)
    right = min(geometry.width - crop.left - columns, margin_x)
    below = min(geometry.height - crop.top - rows, margin_y)
    return MaskCrop(np.pad(crop.mask, ((above, below), (left, right))), crop.left - left, crop.top - above)
