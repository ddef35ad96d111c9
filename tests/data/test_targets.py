"""Coverage against the definition: the areas of overlap between pixels and cells, written out as matrices."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from sam_cache.data.geometry import Geometry
from sam_cache.data.rle import mask_to_rle, rle_to_mask
from sam_cache.data.runs import column_runs
from sam_cache.data.targets import CELL, cover, coverage, valid_coverage

SIDES = st.integers(1, 300)
FITS = st.sampled_from(["longest", "squash"])
INPUT, RESOLUTION = 128, 32
MASKS = arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=90), elements=st.integers(0, 1))


def overlaps(pixels, content, resolution=RESOLUTION, unit=None):
    """(cells, pixels): how much of each cell each pixel of one axis covers; in whole parts of `unit` to a cell."""
    edges = np.arange(pixels + 1) * (content / pixels * (resolution / INPUT))
    cells = np.arange(resolution)[:, None]
    if unit:
        edges, cells = np.rint(edges * unit).astype(np.int64), cells * unit
    return (np.minimum(cells + (unit or 1), edges[1:]) - np.maximum(cells, edges[:-1])).clip(0)


def plain_coverage(mask, geometry, resolution=RESOLUTION):
    """Bit for bit, since all sums are of whole numbers."""
    rows = overlaps(geometry.height, geometry.content_height, resolution, CELL)
    columns = overlaps(geometry.width, geometry.content_width, resolution, CELL)
    return (rows @ mask.astype(np.int64) @ columns.T / float(CELL) ** 2).astype(np.float32)


def drawn(patches, resolution=RESOLUTION):
    masks = np.zeros((len(patches), resolution, resolution), np.float32)
    for mask, patch in zip(masks, patches, strict=True):
        mask[patch.box] = patch.cells
    return masks


@given(MASKS, FITS)
def test_coverage_equals_its_definition_bit_for_bit(mask, fit):
    geometry = Geometry(*mask.shape, INPUT, fit)
    found = coverage(mask_to_rle(mask), geometry, RESOLUTION)
    assert found.dtype == np.float32
    assert np.array_equal(found, plain_coverage(mask, geometry))
    rows = overlaps(geometry.height, geometry.content_height)
    in_reals = rows @ mask @ overlaps(geometry.width, geometry.content_width).T
    assert found == pytest.approx(in_reals, abs=1e-6)


@given(MASKS.map(np.transpose) | MASKS.map(lambda mask: mask[::-1, ::-1]) | MASKS.map(np.asfortranarray), FITS)
def test_views_of_memory_do_not_matter(mask, fit):
    geometry = Geometry(*mask.shape, INPUT, fit)
    assert np.array_equal(coverage(mask_to_rle(mask), geometry, RESOLUTION), plain_coverage(mask, geometry))


@st.composite
def scenes(draw):
    """Several masks of one image, small or much larger than the cells: empty, full, thin, full height, or noise."""
    height, width = draw(st.integers(1, 400)), draw(st.integers(1, 400))
    random = np.random.default_rng(draw(st.integers(0, 99)))
    masks = []
    for kind in draw(st.lists(st.sampled_from(["empty", "full", "row", "column", "stripe", "noise", "pixel"]))):
        mask = np.zeros((height, width), bool)
        y, x = random.integers(height), random.integers(width)
        if kind == "full":
            mask[:] = True
        elif kind == "row":
            mask[y] = True
        elif kind == "column":
            mask[:, x] = True
        elif kind == "stripe":  # runs on from one column into the next
            mask[:, x : x + 3] = True
            mask[y, x] = False
        elif kind == "noise":
            mask = random.random((height, width)) < 0.4
        elif kind == "pixel":
            mask[y, x] = True
        masks.append(mask)
    return (height, width), masks


@given(scenes(), FITS, st.sampled_from([4, 32, 100]))
def test_objects_covered_together_are_those_covered_one_by_one(scene, fit, resolution):
    size, masks = scene
    geometry = Geometry(*size, INPUT, fit)
    rles = [mask_to_rle(mask) for mask in masks]
    found = drawn(cover(column_runs(rles, *size), geometry, resolution), resolution)
    assert len(found) == len(masks)
    for mask, rle, each in zip(masks, rles, found, strict=True):
        assert np.array_equal(each, plain_coverage(mask, geometry, resolution))
        assert np.array_equal(each, coverage(rle, geometry, resolution))


@given(SIDES, SIDES, FITS, st.integers(0, 9))
def test_no_area_is_lost_and_none_is_on_the_padding(height, width, fit, seed):
    mask = np.random.default_rng(seed).random((height, width)) < 0.3
    geometry = Geometry(height, width, INPUT, fit)
    found, valid = coverage(mask_to_rle(mask), geometry, RESOLUTION), valid_coverage(geometry, RESOLUTION)
    cell = (INPUT / RESOLUTION) ** 2 / (geometry.scale_x * geometry.scale_y)
    assert found.sum(dtype=np.float64) * cell == pytest.approx(mask.sum(), rel=1e-5)
    assert valid.sum(dtype=np.float64) * cell == pytest.approx(height * width, rel=1e-5)
    assert found.min() >= 0
    assert (found <= valid + 1e-5).all()


@given(SIDES, SIDES, FITS)
def test_valid_is_the_coverage_of_the_image(height, width, fit):
    geometry = Geometry(height, width, INPUT, fit)
    whole = coverage(mask_to_rle(np.ones((height, width), bool)), geometry, RESOLUTION)
    valid = valid_coverage(geometry, RESOLUTION)
    assert valid.dtype == np.float32
    assert valid == pytest.approx(whole, abs=1e-6)
    out = np.full((RESOLUTION, RESOLUTION), np.nan, np.float32)
    assert valid_coverage(geometry, RESOLUTION, out=out) is out
    assert np.array_equal(out, valid)


def test_cells_outside_of_a_mask_are_0_and_those_inside_1():
    mask = np.zeros((317, 291), bool)
    mask[31:250, 17:203] = True
    mask[100:150, 100:150] = False
    found = coverage(mask_to_rle(mask), Geometry(317, 291, INPUT), RESOLUTION)
    rows, columns = overlaps(317, 128), overlaps(291, Geometry(317, 291, INPUT).content_width)
    area = (rows @ np.ones((317, 291)) @ columns.T).round(9)
    inside = (rows @ mask @ columns.T).round(9)
    assert np.array_equal(found == 0, inside == 0)
    assert np.array_equal(found == 1, (inside == area) & (area == 1))
    assert (found == 1).sum() > 100


def test_one_pixel_of_a_huge_image_does_not_vanish():
    before = 12287 * 2048 + 2047  # pixels above it and to its left; it is the last one
    found = coverage(rle_of_runs([before, 1]), Geometry(2048, 12288, 1024), 256)
    assert found.sum() == pytest.approx((256 / 12288) * (171 / 1024 * 256 / 2048), rel=1e-5)
    assert found[42, 255] == found.sum()  # 171 of 1024 rows are image: the last cell is number 42


def rle_of_runs(runs):
    from pycocotools import mask as coco_mask

    return coco_mask.frPyObjects({"size": [2048, 12288], "counts": runs}, 2048, 12288)["counts"]


def test_real_nuclei_keep_their_areas(real_data):
    annotations = json.loads((real_data / "nuclei_dsb2018/derived/instances_rle.json").read_text())["annotations"]
    for annotation in annotations[::20]:
        (height, width), rle = annotation["segmentation"]["size"], annotation["segmentation"]["counts"].encode()
        geometry, area = Geometry(height, width, 1024), rle_to_mask(rle, height, width).sum()
        found = coverage(rle, geometry, 256)
        cell = (1024 / 256) ** 2 / (geometry.scale_x * geometry.scale_y)
        assert found.sum(dtype=np.float64) * cell == pytest.approx(area, rel=1e-5)
    assert annotations
