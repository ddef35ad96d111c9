"""An image that is asked about tile by tile, and the answers put together again."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from sam_cache.data import Geometry, MaskCrop
from sam_cache.types import Prompts


@dataclass(frozen=True)
class Tile:
    """Where a tile lies in its image of `size` (rows, columns), in pixels of the image.

    `shown` are the rows and columns it shows. `own` are those of them that are its own: where tiles overlap, a
    pixel belongs to the one whose border is farther, so the overlap is split in the middle, and every pixel
    of the image belongs to one tile.
    """

    size: tuple[int, int]
    shown: tuple[slice, slice]
    own: tuple[slice, slice]

    @property
    def offset_xy_image(self) -> tuple[int, int]:
        return self.shown[1].start, self.shown[0].start

    @property
    def own_inside(self) -> tuple[slice, slice]:
        """`own` in pixels of the tile."""
        rows, columns = (
            slice(own.start - shown.start, own.stop - shown.start)
            for own, shown in zip(self.own, self.shown, strict=True)
        )
        return rows, columns


@dataclass(frozen=True)
class Reply:
    """What the networks said to one prompt, not scored yet: by network name a mask and its predicted IoU.

    `id` is the object's own, the same in all tiles; `object` its place in the columns of objects. Masks are cut
    to their boxes: all tiles of an image and all kinds of prompts are kept at once. `prompt` is without its mask.
    """

    object: int
    id: int
    category: int
    geometry: Geometry
    prompt: Prompts
    truth: MaskCrop
    masks: dict[str, MaskCrop]
    predicted: dict[str, float]


def lay_tiles(boxes_xywh_image: Sequence[tuple[int, int, int, int]]) -> list[Tile]:
    """The tiles (x, y, w, h) of one image, which lie in rows and columns and together cover it."""
    across = _share([(x, x + w) for x, _, w, _ in boxes_xywh_image])
    down = _share([(y, y + h) for _, y, _, h in boxes_xywh_image])
    size = max(stop for _, stop in down), max(stop for _, stop in across)
    return [
        Tile(size, (slice(y, y + h), slice(x, x + w)), (slice(*down[y, y + h]), slice(*across[x, x + w])))
        for x, y, w, h in boxes_xywh_image
    ]


def _share(spans: Sequence[tuple[int, int]]) -> dict[tuple[int, int], tuple[int, int]]:
    """For each stretch of one axis the part of it that is its own."""
    ordered = sorted(set(spans))
    edges = [ordered[0][0], *((stop + start) // 2 for (_, stop), (start, _) in pairwise(ordered)), ordered[-1][1]]
    return dict(zip(ordered, pairwise(edges), strict=True))


def paste(parts: Sequence[tuple[Tile, MaskCrop]]) -> MaskCrop:
    """One mask of the whole image from masks of its tiles, each of which counts on its own pixels."""
    return _lay([(tile, mask.within(*tile.own_inside)) for tile, mask in parts])


def unite(parts: Sequence[tuple[Tile, MaskCrop]]) -> MaskCrop:
    """The same where the masks agree with one another, as true ones do: whatever any of them holds."""
    return _lay(parts)


def _lay(parts: Sequence[tuple[Tile, MaskCrop]]) -> MaskCrop:
    """Masks of tiles on one canvas, no larger than it must be."""
    placed = []
    for tile, crop in parts:
        right, down = tile.offset_xy_image
        if crop.mask.size:
            placed.append((crop.top + down, crop.left + right, crop.mask))
    if not placed:
        return MaskCrop(np.zeros((0, 0), np.uint8))
    top, left = min(top for top, _, _ in placed), min(left for _, left, _ in placed)
    height = max(top + mask.shape[0] for top, _, mask in placed) - top
    width = max(left + mask.shape[1] for _, left, mask in placed) - left
    canvas = np.zeros((height, width), np.uint8)
    for y, x, mask in placed:
        canvas[y - top :, x - left :][: mask.shape[0], : mask.shape[1]] |= mask
    return MaskCrop(canvas, left, top)


def join_tiles(parts: Sequence[tuple[Tile | None, list[Reply]]]) -> Iterator[Reply]:
    """The replies about the whole image, one after the other: parts of one object, which its id tells, become one.

    The score of a whole mask is the mean of its parts' predicted IoUs, weighted by the object's area on the
    pixels that are each tile's own. `geometry` is that of the whole image; `prompt` holds the prompts of all
    parts, laid into its input. Replies to an image that is in no tiles are given back.
    """
    by_id: dict[int, list[tuple[Tile, Reply]]] = {}
    for tile, replies in parts:
        if tile is None:
            yield from replies
            continue
        for reply in replies:
            by_id.setdefault(reply.id, []).append((tile, reply))
    for found in by_id.values():
        yield _join(found)


def _join(parts: list[tuple[Tile, Reply]]) -> Reply:
    first = parts[0][1]
    geometry = Geometry(*parts[0][0].size, first.geometry.input_size, first.geometry.fit)
    areas = [np.count_nonzero(reply.truth.within(*tile.own_inside).mask) for tile, reply in parts]
    if not any(areas):
        areas = [np.count_nonzero(reply.truth.mask) for _, reply in parts]
    return replace(
        first,
        geometry=geometry,
        prompt=_join_prompts(parts, geometry),
        truth=unite([(tile, reply.truth) for tile, reply in parts]),
        masks={name: paste([(tile, reply.masks[name]) for tile, reply in parts]) for name in first.masks},
        predicted={
            name: float(np.average([reply.predicted[name] for _, reply in parts], weights=areas))
            for name in first.predicted
        },
    )


def _join_prompts(parts: list[tuple[Tile, Reply]], geometry: Geometry) -> Prompts:
    """What was asked, as points and boxes of the whole image."""
    moved = []
    for tile, reply in parts:
        prompt, shift = reply.prompt, np.array(tile.offset_xy_image)
        points = reply.geometry.points_to_image(prompt.points_xy_input.numpy()) + shift
        boxes = reply.geometry.boxes_to_image(prompt.boxes_xyxy_input.numpy()) + np.tile(shift, 2)
        moved.append(
            replace(
                prompt,
                points_xy_input=torch.from_numpy(geometry.points_to_input(points)).float(),
                boxes_xyxy_input=torch.from_numpy(geometry.boxes_to_input(boxes)).float(),
            )
        )
    return Prompts.join(moved)
