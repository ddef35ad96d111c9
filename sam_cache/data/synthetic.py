"""Procedural scenes: cluttered, textured and shaded, with a mask for every object that is exact.

A scene depends on (seed, number) and nothing else. Where things lie is drawn from one random
stream and how they look from another, so that masks are had without painting. An object's mask is
the pixels it covers at least half and no later object does: masks of a scene never overlap.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.random import Generator, default_rng

from sam_cache.data.dataset import Dataset
from sam_cache.data.rle import mask_to_rle, measure_rle
from sam_cache.data.shapes import SHAPES, draw_outline
from sam_cache.types import ImageRecord, ObjectRecord

SIZE, LAYOUT, LOOK = range(3)  # the random streams of a scene
THIN = {"rod", "spiral", "crack"}
CATEGORIES = dict(enumerate(SHAPES, start=1))
LEAST_VISIBLE, LEAST_PIXELS = 0.25, 24  # what later objects must leave in sight of one
LIGHT = (-0.45, -0.55, 0.7)  # where it comes from: x, y and towards the viewer


@dataclass(frozen=True)
class Thing:
    """One object of a scene: its category and coverage (H, W), uint8 with soft edges."""

    category: int
    coverage: np.ndarray


def open_synthetic(count: int, seed: int = 0, size: int = 560) -> Dataset:
    """`count` scenes of about `size` x `size` pixels in area and varied aspect ratio. Nothing is written to disk."""
    records = [
        ImageRecord(number, f"scene-{seed}-{number:06d}.bmp", *scene_size(seed, number, size))
        for number in range(count)
    ]

    def read(record: ImageRecord) -> bytes:
        image = paint_scene(seed, record.id, (record.height, record.width))
        return cv2.imencode(".bmp", image[:, :, ::-1])[1].tobytes()  # not compressed: nobody keeps it

    def convert(number: int) -> tuple[list[ObjectRecord], list[str]]:
        things, owner = place_things(seed, number, (records[number].height, records[number].width))
        objects = []
        for index, thing in enumerate(things):
            rle = mask_to_rle(owner == index)
            box, area = measure_rle(rle, *owner.shape)
            objects.append(ObjectRecord(number << 8 | index, thing.category, rle, box, area))
        return objects, []

    return Dataset(records, CATEGORIES, read, convert, notes=[f"{count} synthetic scenes of seed {seed}"])


def scene_size(seed: int, number: int, size: int) -> tuple[int, int]:
    """Height and width of a scene: width to height between 3:5 and 5:3."""
    stretch = np.exp(default_rng((seed, number, SIZE)).uniform(-0.255, 0.255))
    return round(size / stretch), round(size * stretch)


def place_things(seed: int, number: int, size: tuple[int, int]) -> tuple[list[Thing], np.ndarray]:
    """Five to twelve objects, the hindmost first, and the map (H, W) that says which is seen where, -1 for none."""
    rng = default_rng((seed, number, LAYOUT))
    height, width = size
    side = np.sqrt(height * width)
    wanted = int(rng.integers(5, 13))
    things: list[Thing] = []
    owner = np.full(size, -1, np.int8)
    areas, seen = np.zeros(0, int), np.zeros(0, int)  # of each object: all its pixels, those in sight
    for _ in range(4 * wanted):
        category = int(rng.integers(1, len(CATEGORIES) + 1))
        name = CATEGORIES[category]
        low, high = (0.14, 0.32) if name in THIN else (0.08, 0.22)
        radius = side * low * (high / low) ** rng.uniform()
        center = rng.uniform((0.06 * width, 0.06 * height), (0.94 * width, 0.94 * height))
        coverage = draw_outline(SHAPES[name](rng), center, radius, rng.uniform(0, 2 * np.pi), size)
        solid = coverage >= 128
        hidden = np.bincount(owner[solid] + 1, minlength=len(things) + 1)
        area = int(hidden.sum())
        left = seen - hidden[1:]
        if area < LEAST_PIXELS or (left < np.maximum(LEAST_PIXELS, LEAST_VISIBLE * areas)).any():
            continue  # it would hide too much of another one
        owner[solid] = len(things)
        things.append(Thing(category, coverage))
        areas, seen = np.append(areas, area), np.append(left, area)
        if len(things) == wanted:
            break
    return things, owner


def paint_scene(seed: int, number: int, size: tuple[int, int]) -> np.ndarray:
    """The picture (H, W, 3), uint8 RGB."""
    rng = default_rng((seed, number, LOOK))
    canvas = _paint_ground(rng, size)
    for thing in place_things(seed, number, size)[0]:
        _paint_thing(canvas, thing, rng)
    canvas += 0.008 * rng.standard_normal(size, np.float32)  # film grain
    return cv2.convertScaleAbs(cv2.merge(np.maximum(canvas, 0, out=canvas)), alpha=255)


# Pictures are painted as planes (3, H, W), float32: NumPy spreads one plane over three quickly, one
# value over three slowly.


def _paint_ground(rng: Generator, size: tuple[int, int]) -> np.ndarray:
    """A quiet surface in two related colours, darker towards one side."""
    hue = rng.uniform()
    near, far = _colour(hue, 0.3, 0.75), _colour(hue + rng.uniform(-0.12, 0.12), 0.4, 0.45)
    slope = np.linspace(1.1, 0.8, size[0], dtype=np.float32)[:, None]
    return (near + (far - near) * _noise(rng, size, 0.5)) * slope


def _paint_thing(canvas: np.ndarray, thing: Thing, rng: Generator) -> None:
    """Lay one object on the canvas, with its shadow under it."""
    rows, columns = _crop(thing.coverage)
    side = float(np.sqrt(thing.coverage.size))
    coverage = thing.coverage[rows, columns].astype(np.float32) / 255
    size = coverage.shape
    reach = max(2, round(side * 0.012))
    shadow = cv2.warpAffine(coverage, np.float32([[1, 0, reach * 0.7], [0, 1, reach]]), size[::-1])
    shadow = cv2.GaussianBlur(shadow, (0, 0), reach * 0.6)
    patch = canvas[:, rows, columns]
    patch *= (1 - 0.5 * shadow) * (1 - coverage)
    if CATEGORIES[thing.category] == "crack":
        patch += coverage * _colour(rng.uniform(), 0.4, 0.14)
    else:
        patch += coverage * _shade(coverage, side) * _texture(rng, size)


def _texture(rng: Generator, size: tuple[int, int]) -> np.ndarray:
    """A surface (3, H, W) in two colours: mottled, striped, dotted or nearly plain."""
    hue = rng.uniform()
    first = _colour(hue, rng.uniform(0.45, 0.85), rng.uniform(0.6, 0.95))
    second = _colour(hue + rng.uniform(-0.15, 0.15), rng.uniform(0.4, 0.9), rng.uniform(0.35, 0.7))
    kind, angle, wavelength = rng.integers(4), rng.uniform(0, np.pi), rng.uniform(9, 26)
    x, y = np.arange(size[1], dtype=np.float32), np.arange(size[0], dtype=np.float32)[:, None]
    cos, sin = np.float32([np.cos(angle), np.sin(angle)]) * np.float32(2 * np.pi / wavelength)
    along, across = x * cos + y * sin, y * cos - x * sin
    if kind == 0:
        mix = _noise(rng, size, 0.15)
    elif kind == 1:
        mix = 0.5 + 0.5 * np.tanh(3 * np.sin(along + 2.5 * _noise(rng, size, 0.4)))
    elif kind == 2:
        mix = 0.5 + 0.5 * np.tanh(5 * (np.sin(along) * np.sin(across) - 0.35))
    else:
        mix = 0.3 * _noise(rng, size, 0.6)
    return first + (second - first) * mix


def _shade(coverage: np.ndarray, side: float) -> np.ndarray:
    """Light on a body whose rim is rounded: brightness (H, W) around 1."""
    depth = cv2.distanceTransform((coverage >= 0.5).astype(np.uint8), cv2.DIST_L2, 5)
    bevel = float(np.clip(depth.max(), 2, side * 0.045))
    rise = np.minimum(depth / bevel, 1)
    relief = cv2.GaussianBlur(np.sqrt(1 - (1 - rise) ** 2) * bevel, (0, 0), max(0.8, bevel * 0.12))
    dx = cv2.Sobel(relief, cv2.CV_32F, 1, 0, scale=0.125)
    dy = cv2.Sobel(relief, cv2.CV_32F, 0, 1, scale=0.125)
    facing = (LIGHT[2] - dx * LIGHT[0] - dy * LIGHT[1]) / np.sqrt(1 + dx * dx + dy * dy)
    facing = np.clip(facing, 0, 1)
    return 0.48 + 0.72 * facing + 0.35 * facing**16


def _noise(rng: Generator, size: tuple[int, int], cell: float) -> np.ndarray:
    """Smooth noise (H, W) in [0, 1]; `cell` is the largest feature as a part of the longer side.

    A coarse random grid, refined by doubling: each finer grid adds detail of half the strength.
    """
    step, weight, grid = max(4.0, cell * max(size)), 1.0, None
    while grid is None or (step >= 4 and weight > 0.1):
        height, width = int(size[0] / step) + 3, int(size[1] / step) + 3
        detail = weight * rng.random((height, width), np.float32)
        grid = detail if grid is None else detail + cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
        weight, step = weight / 2, step / 2
    return cv2.normalize(cv2.resize(grid, size[::-1], interpolation=cv2.INTER_CUBIC), None, 0, 1, cv2.NORM_MINMAX)


def _colour(hue: float, saturation: float, value: float) -> np.ndarray:
    """RGB (3, 1, 1) in [0, 1] of a hue in turns."""
    fraction = np.abs((hue + np.array([0, 2 / 3, 1 / 3])) % 1 * 6 - 3) - 1
    return (value * (1 - saturation * (1 - np.clip(fraction, 0, 1)))).astype(np.float32)[:, None, None]


def _crop(coverage: np.ndarray) -> tuple[slice, slice]:
    """The part of the image an object and its shadow can touch."""
    x, y, w, h = cv2.boundingRect(coverage)
    margin = round(0.04 * np.sqrt(coverage.size))
    return slice(max(0, y - margin), y + h + margin), slice(max(0, x - margin), x + w + margin)
