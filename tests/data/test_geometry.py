import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from segment_anything.utils.transforms import ResizeLongestSide

from sam_cache.data.geometry import Geometry

SIDES = st.integers(1, 13000)
FITS = st.sampled_from(["longest", "squash"])


@given(SIDES, SIDES, st.sampled_from([128, 1024]))
def test_longest_is_upstreams_arithmetic_to_the_bit(height, width, size):
    geometry, upstream = Geometry(height, width, size), ResizeLongestSide(size)
    rows, columns = upstream.get_preprocess_shape(height, width, size)
    assert (geometry.content_height, geometry.content_width) == (max(rows, 1), max(columns, 1))
    if rows and columns:
        points = np.array([[0, 0], [width - 1, height - 1], [width / 3, height / 7]])
        boxes = np.array([[0, 0, width, height], [0.5, 0.25, width / 3, height / 7]])
        assert np.array_equal(geometry.points_to_input(points), upstream.apply_coords(points, (height, width)))
        assert np.array_equal(geometry.boxes_to_input(boxes), upstream.apply_boxes(boxes, (height, width)))


@given(SIDES, SIDES, FITS)
def test_the_whole_image_becomes_the_content_and_comes_back(height, width, fit):
    geometry = Geometry(height, width, 1024, fit)
    box = np.array([0, 0, width, height], np.float64)
    content = geometry.boxes_to_input(box)
    assert content == pytest.approx([0, 0, geometry.content_width, geometry.content_height], rel=1e-12)
    assert geometry.boxes_to_image(content) == pytest.approx(box, rel=1e-12)
    points = np.array([[0.25, 3], [width, height]])
    assert geometry.points_to_image(geometry.points_to_input(points)) == pytest.approx(points, rel=1e-12)


def test_squash_fills_the_square():
    geometry = Geometry(40, 1000, 128, "squash")
    assert (geometry.content_height, geometry.content_width) == (128, 128)
    assert (geometry.scale_x, geometry.scale_y) == (0.128, 3.2)


def test_sides_have_their_own_scales():
    geometry = Geometry(333, 500, 128)
    assert geometry.scale_x == 128 / 500
    assert geometry.scale_y == 85 / 333 != geometry.scale_x
