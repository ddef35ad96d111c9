"""Coverage against the definition: the areas of overlap between pixels and cells, written out as matrices."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from sam_cache.data.crops import MaskCrop, crop_rle
from sam_cache.data.geometry import Geometry
from sam_cache.data.rle import mask_to_rle, rle_to_mask
from sam_cache.data.targets import coverage, valid_coverage

SIDES = st.integers(1, 300)
FITS = st.sampled_from(["longest", "squash"])
INPUT, RESOLUTION = 128, 32


def overlaps(pixels, content):
    """(cells, pixels): how much of each cell each pixel of one axis covers."""
    cells, edges = np.arange(RESOLUTION)[:, None], np.arange(pixels + 1) * (content * RESOLUTION / INPUT / pixels)
    return (np.minimum(cells + 1, edges[1:]) - np.maximum(cells, edges[:-1])).clip(0)


def plain_coverage(mask, geometry):
    rows = overlaps(geometry.height, geometry.content_height)
    return rows @ mask @ overlaps(geometry.width, geometry.content_width).T


@given(arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=90), elements=st.integers(0, 1)), FITS)
def test_coverage_equals_its_definition(mask, fit):
    geometry = Geometry(*mask.shape, INPUT, fit)
    found = coverage(MaskCrop(mask), geometry, RESOLUTION)
    assert found.dtype == np.float32
    assert found == pytest.approx(plain_coverage(mask, geometry), abs=1e-6)
    if mask.any():
        crop = crop_rle(mask_to_rle(mask), *mask.shape)
        assert coverage(crop, geometry, RESOLUTION) == pytest.approx(found, abs=1e-6)


@given(SIDES, SIDES, FITS, st.integers(0, 9))
def test_no_area_is_lost_and_none_is_on_the_padding(height, width, fit, seed):
    mask = (np.random.default_rng(seed).random((height, width)) < 0.3).astype(np.uint8)
    geometry = Geometry(height, width, INPUT, fit)
    found, valid = coverage(MaskCrop(mask), geometry, RESOLUTION), valid_coverage(geometry, RESOLUTION)
    cell = (INPUT / RESOLUTION) ** 2 / (geometry.scale_x * geometry.scale_y)
    assert found.sum(dtype=np.float64) * cell == pytest.approx(mask.sum(), rel=1e-5)
    assert valid.sum(dtype=np.float64) * cell == pytest.approx(height * width, rel=1e-5)
    assert found.min() >= 0
    assert (found <= valid + 1e-5).all()


@given(SIDES, SIDES, FITS)
def test_valid_is_the_coverage_of_the_image(height, width, fit):
    geometry = Geometry(height, width, INPUT, fit)
    whole = coverage(MaskCrop(np.ones((height, width), np.uint8)), geometry, RESOLUTION)
    assert valid_coverage(geometry, RESOLUTION) == pytest.approx(whole, abs=1e-6)


def test_one_pixel_of_a_huge_image_does_not_vanish():
    mask = np.ones((1, 1), np.uint8)
    found = coverage(MaskCrop(mask, left=12287, top=2047), Geometry(2048, 12288, 1024), 256)
    assert found.sum() == pytest.approx((256 / 12288) * (171 / 1024 * 256 / 2048), rel=1e-5)
    assert found[42, 255] == found.sum()  # 171 of 1024 rows are image: the last cell is number 42


def test_orders_of_memory_do_not_matter():
    mask = (np.random.default_rng(0).random((33, 50)) < 0.5).astype(np.uint8)
    geometry = Geometry(33, 50, INPUT)
    by_columns = coverage(MaskCrop(np.asfortranarray(mask)), geometry, RESOLUTION)
    assert np.array_equal(by_columns, coverage(MaskCrop(mask), geometry, RESOLUTION))


def test_real_nuclei_keep_their_areas(real_data):
    annotations = json.loads((real_data / "nuclei_dsb2018/derived/instances_rle.json").read_text())["annotations"]
    for annotation in annotations[::20]:
        (height, width), rle = annotation["segmentation"]["size"], annotation["segmentation"]["counts"].encode()
        geometry, area = Geometry(height, width, 1024), rle_to_mask(rle, height, width).sum()
        found = coverage(crop_rle(rle, height, width), geometry, 256)
        cell = (1024 / 256) ** 2 / (geometry.scale_x * geometry.scale_y)
        assert found.sum(dtype=np.float64) * cell == pytest.approx(area, rel=1e-5)
    assert annotations
