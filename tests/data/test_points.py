"""Deterministic points against their definitions, tried pixel by pixel."""

import json
from fractions import Fraction
from math import floor

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from sam_cache.data.crops import crop_rle
from sam_cache.data.points import deterministic_points
from sam_cache.data.rle import mask_to_rle, rle_to_mask

MASKS = arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, max_side=12)).filter(np.any)


def points_of(mask):
    return deterministic_points(mask_to_rle(mask), *mask.shape)


def pixels_of(mask):
    return [(int(x), int(y)) for y, x in np.argwhere(mask)]  # uppermost first, then leftmost


def square_distance(one, other):
    return (one[0] - other[0]) ** 2 + (one[1] - other[1]) ** 2


def plain_points(mask):
    """(centroid, center of the box, interior) by the words of `DeterministicPoints`, before any is moved."""
    inside = pixels_of(mask)
    half = Fraction(1, 2)
    centroid = tuple(floor(Fraction(sum(values), len(inside)) + half) for values in zip(*inside, strict=True))
    center = tuple((min(values) + max(values) + 1) // 2 for values in zip(*inside, strict=True))
    outside = pixels_of(~np.pad(mask, 1))
    depth = {(x, y): min(square_distance((x + 1, y + 1), other) for other in outside) for x, y in inside}
    deepest = [pixel for pixel in inside if depth[pixel] == max(depth.values())]
    return centroid, center, min(deepest, key=lambda pixel: square_distance(pixel, centroid))


@given(MASKS)
@example(np.ones((1, 1), bool))
@example(np.eye(7, dtype=bool))
@example(np.ones((4, 6), bool))
def test_points_equal_their_definitions(mask):
    points = points_of(mask)
    centroid, center, interior = plain_points(mask)
    assert points.interior_xy_image == interior
    for found, moved, plain in (
        (points.centroid_xy_image, points.centroid_moved, centroid),
        (points.bbox_center_xy_image, points.bbox_center_moved, center),
    ):
        assert moved == (plain not in pixels_of(mask))
        assert found == min(pixels_of(mask), key=lambda pixel: square_distance(pixel, plain))


@pytest.mark.parametrize("seed", range(6))
def test_the_interior_is_exact_where_a_chamfer_distance_is_not(seed):
    mask = np.ones((26, 26), bool)
    mask[tuple(np.random.default_rng(seed).integers(0, 26, (2, 4)))] = False
    assert points_of(mask).interior_xy_image == plain_points(mask)[2]


@given(MASKS)
def test_a_crop_is_the_mask_in_its_tight_box(mask):
    crop = crop_rle(mask_to_rle(mask), *mask.shape)
    whole = np.zeros_like(mask)
    rows, columns = crop.mask.shape
    whole[crop.top : crop.top + rows, crop.left : crop.left + columns] = crop.mask
    assert np.array_equal(whole, mask)
    assert crop.mask[0].any()
    assert crop.mask[-1].any()
    assert crop.mask[:, 0].any()
    assert crop.mask[:, -1].any()


def test_a_ring_is_clicked_on_its_band():
    y, x = np.mgrid[:41, :51]
    radius = np.hypot(x - 25, y - 20)
    points = points_of((radius >= 10) & (radius <= 16))
    assert points.centroid_moved
    assert points.bbox_center_moved
    assert np.hypot(points.centroid_xy_image[0] - 25, points.centroid_xy_image[1] - 20) == 10
    assert 12 <= np.hypot(points.interior_xy_image[0] - 25, points.interior_xy_image[1] - 20) <= 14


def test_a_crack_one_pixel_wide_is_clicked_near_its_middle():
    crack = np.zeros((50, 60), bool)
    crack[np.arange(50), np.arange(50)] = True
    assert points_of(crack).interior_xy_image == (25, 25)


def test_the_border_of_the_image_is_outside():
    left = np.zeros((21, 40), bool)
    left[:, :20] = True
    assert points_of(left).interior_xy_image == (10, 10)


@pytest.mark.parametrize("pattern", ["crackforest/derived/masks_png/*.png", "chasedb1/*_1stHO.png"])
def test_points_of_real_cracks_and_vessels_are_on_them(real_data, pattern):
    files = sorted(real_data.glob(pattern))
    moved = 0
    for file in files:
        mask = np.asarray(Image.open(file)).astype(bool)
        points = points_of(mask)
        moved += points.centroid_moved
        for x, y in (points.centroid_xy_image, points.bbox_center_xy_image, points.interior_xy_image):
            assert mask[y, x]
    assert moved > len(files) / 2  # why `interior` exists


def test_points_of_real_nuclei_are_on_them(real_data):
    annotations = json.loads((real_data / "nuclei_dsb2018/derived/instances_rle.json").read_text())["annotations"]
    for annotation in annotations[::5]:
        (height, width), rle = annotation["segmentation"]["size"], annotation["segmentation"]["counts"].encode()
        points, mask = deterministic_points(rle, height, width), rle_to_mask(rle, height, width)
        for x, y in (points.centroid_xy_image, points.bbox_center_xy_image, points.interior_xy_image):
            assert mask[y, x]
    assert annotations
