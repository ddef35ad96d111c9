"""One sampler of prompts for training and evaluation.

Chance is keyed by (seed, epoch, image, object): an object is asked for in the same way whatever
batch, position or process it comes up in, and whatever is asked for beside it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np
import torch
from numpy.random import Generator

from sam_cache.data.crops import MaskCrop
from sam_cache.data.geometry import Geometry
from sam_cache.data.noise_masks import degrade_mask
from sam_cache.data.runs import ColumnRuns
from sam_cache.data.streams import KeyedStreams, doubles_of, floats_of
from sam_cache.errors import UsageError
from sam_cache.types import Prompts

# The order is fixed: `Prompts.kind` indexes it.
KINDS = ("centroid", "bbox-center", "interior", "point", "box", "none", "noise-mask")
POINT, BOX, NOISE_MASK = map(KINDS.index, ("point", "box", "noise-mask"))

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

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of an object table that prompts of these kinds are made from."""
        kinds = [choice.kind for choice in self.choices]
        points = [POINT_COLUMNS[kind] for kind in dict.fromkeys(kinds) if kind in POINT_COLUMNS]
        return ("id", *["box_xywh_image"] * bool({"box", "noise-mask"} & set(kinds)), *points)

    def choose(self, chance: np.ndarray) -> np.ndarray:
        """The places of the choices that numbers in [0, 1) fall on."""
        bounds = np.array([choice.weight for choice in self.choices]).cumsum()
        return bounds[:-1].searchsorted(chance * bounds[-1], "right")


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
    runs_of: Callable[[int], ColumnRuns],
    coverage_of: Callable[[int], np.ndarray],
    *,
    seed: int,
    epochs: Sequence[int],
    training: bool,
) -> Prompts:
    """Draw one prompt for each of P objects, the same for the same (seed, epoch, image, object).

    `objects` are columns of a store's object table, those that `mixture.columns` names. `image_index[p]`
    says which of the images object p is in; these have `image_ids`, `geometries` and `epochs`. `runs_of(p)`
    gives object p's mask and is called for the kind `point` only; `coverage_of(p)`, its coverage (h, w) of the
    decoder's cells, for the kind `noise-mask` only. `training` turns the noise of boxes on.

    Foreground points are drawn uniformly from the mask without repetition; an object of fewer pixels
    gets as many points as it has pixels. Background points come from outside the mask but near its
    box, or from the whole image where there are too few of those; a mask that fills the image has none.
    An object so small that nothing is left of its `noise-mask` is asked for by its box instead, and its
    `kind` says so.

    Only points and noise masks are drawn one by one; all else comes from the first words of the objects'
    streams, for all objects in one go.
    """
    images, count = np.array(image_index, np.int64), len(image_index)
    scales = np.array([(each.scale_x, each.scale_y) for each in geometries]).reshape(-1, 2)[images]
    streams = KeyedStreams(seed)
    keys = [
        (image_ids[image], epochs[image], id) for image, id in zip(image_index, objects["id"].tolist(), strict=True)
    ]
    words = np.array([streams.words(*key, 6) for key in keys], np.uint64).reshape(count, 6)
    drawn = mixture.choose(doubles_of(words[:, 0]))
    kinds = np.array([KINDS.index(choice.kind) for choice in mixture.choices])[drawn]
    noise = 2 * doubles_of(words[:, 1:5]) - 1
    chance = floats_of(np.where((kinds == BOX) & training, words[:, 5], words[:, 1]))

    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    masks: dict[int, np.ndarray] = {}
    for p in np.flatnonzero((kinds == POINT) | (kinds == NOISE_MASK)).tolist():
        random, choice, geometry = streams.at(*keys[p]), mixture.choices[drawn[p]], geometries[image_index[p]]
        random.random()  # has chosen the kind
        if kinds[p] == POINT:
            found[p] = sample_points(runs_of(p), geometry, choice.foreground, choice.background, random)
        elif (degraded := degrade_mask(coverage_of(p), random)) is not None:
            masks[p] = degraded
        else:
            kinds[p] = BOX
            if training:
                noise[p] = random.uniform(-1, 1, 4)
        chance[p] = random.random(2, np.float32)  # last, so that the prompt does not depend on it

    boxes, has_box = np.zeros((count, 4)), kinds == BOX
    if has_box.any():
        boxes[has_box] = _boxes_to_input(objects["box_xywh_image"][has_box], scales[has_box])
        if training:
            limits = np.array([(each.content_width, each.content_height) * 2 for each in geometries])[images[has_box]]
            boxes[has_box] = jitter_boxes(boxes[has_box], noise[has_box], limits)
    counts = np.isin(kinds, [KINDS.index(kind) for kind in POINT_COLUMNS]).astype(np.int64)
    for p, (inside, outside) in found.items():
        counts[p] = len(inside) + len(outside)
    offsets = np.concatenate([[0], counts.cumsum()])
    points, labels = np.zeros((offsets[-1], 2)), np.ones(offsets[-1], np.int64)
    for kind, column in POINT_COLUMNS.items():
        if len(which := np.flatnonzero(kinds == KINDS.index(kind))):
            points[offsets[which]] = objects[column][which] * scales[which]
    for p, (inside, outside) in found.items():
        middle = offsets[p] + len(inside)
        points[offsets[p] : middle] = inside * scales[p]
        points[middle : offsets[p + 1]] = outside * scales[p]
        labels[middle : offsets[p + 1]] = 0
    has_mask = np.zeros(count, bool)
    has_mask[list(masks)] = True
    return Prompts(
        image_index=torch.from_numpy(images),
        kind=torch.from_numpy(kinds),
        points_xy_input=torch.from_numpy(points.astype(np.float32)),
        labels=torch.from_numpy(labels),
        offsets=torch.from_numpy(offsets),
        boxes_xyxy_input=torch.from_numpy(boxes.astype(np.float32)),
        has_box=torch.from_numpy(has_box),
        has_mask=torch.from_numpy(has_mask),
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


def _boxes_to_input(boxes_xywh_image: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Boxes (P, 4) as (x, y, x + w, y + h) in the input frame, `scales` (P, 2) being input per image pixels."""
    corners = np.concatenate([boxes_xywh_image[:, :2], boxes_xywh_image[:, :2] + boxes_xywh_image[:, 2:]], axis=1)
    return corners * np.concatenate([scales, scales], axis=1)


def jitter_boxes(boxes_xyxy_input: np.ndarray, noise: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Move each side of boxes (P, 4) by itself; opposite sides keep 80% of their distance.

    `noise` (P, 4) in [-1, 1) says how far of what is allowed; `limits` (P, 4) are the image's width and height,
    twice, in input pixels.
    """
    sides = boxes_xyxy_input[:, 2:] - boxes_xyxy_input[:, :2]
    allowed = np.minimum(BOX_NOISE * np.concatenate([sides, sides], axis=1), BOX_NOISE_LIMIT)
    return (boxes_xyxy_input + noise * allowed).clip(0, limits)


def sample_points(
    runs: ColumnRuns, geometry: Geometry, foreground: int, background: int, random: Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Points (K, 2) in and (N, 2) outside of a mask, float64 (x, y) in the image, K and N at most as asked for."""
    area = runs.area
    inside = runs.pixels(random.choice(area, min(foreground, area), replace=False)).astype(np.float64)
    if not background:
        return inside, np.zeros((0, 2))
    crop = runs.crop()
    rows, columns = crop.mask.shape
    window = _around(crop, geometry, max(1, int(BACKGROUND_MARGIN * columns)), max(1, int(BACKGROUND_MARGIN * rows)))
    if window.mask.size - np.count_nonzero(window.mask) < background:
        window = _around(crop, geometry, geometry.width, geometry.height)
    places = np.flatnonzero(window.mask == 0)
    chosen = random.choice(places, min(background, len(places)), replace=False)
    y, x = np.divmod(chosen, window.mask.shape[1])
    return inside, np.stack([x + window.left, y + window.top], axis=1).astype(np.float64)


def _around(crop: MaskCrop, geometry: Geometry, margin_x: int, margin_y: int) -> MaskCrop:
    """The crop with so many pixels more on each side, as far as the image goes."""
    rows, columns = crop.mask.shape
    left, above = min(crop.left, margin_x), min(crop.top, margin_y)
    right = min(geometry.width - crop.left - columns, margin_x)
    below = min(geometry.height - crop.top - rows, margin_y)
    return MaskCrop(np.pad(crop.mask, ((above, below), (left, right))), crop.left - left, crop.top - above)
