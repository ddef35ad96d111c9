import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from sam_cache.data.rle import mask_to_rle, measure_rle, parse_rle, rle_to_mask, segmentation_to_rle
from sam_cache.errors import DatasetError


def text(segmentation) -> bytes:
    return json.dumps(segmentation).encode()


def mask_of(segmentation, height, width):
    return rle_to_mask(segmentation_to_rle(text(segmentation), height, width), height, width)


def runs_of(mask):
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(flat, prepend=0)) if len(flat) else []
    return np.diff(np.concatenate([[0], changes, [len(flat)]])).astype(int).tolist()


masks = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1), st.floats(0.01, 0.99)).map(
    lambda t: (np.random.default_rng(t[2]).random(t[:2]) < t[3]).astype(np.uint8)
)


@given(masks)
def test_text_list_and_mask_agree(mask):
    height, width = mask.shape
    rle = mask_to_rle(mask)
    np.testing.assert_array_equal(rle_to_mask(rle, height, width), mask)
    assert parse_rle(rle).tolist() == runs_of(mask)
    for counts in (rle.decode(), runs_of(mask)):
        segmentation = {"size": [height, width], "counts": counts}
        if mask.any():
            np.testing.assert_array_equal(mask_of(segmentation, height, width), mask)
        else:
            with pytest.raises(DatasetError, match="covers no pixel"):
                mask_of(segmentation, height, width)


@given(masks.filter(np.any))
def test_box_and_area(mask):
    box, area = measure_rle(mask_to_rle(mask), *mask.shape)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    assert area == mask.sum()
    assert box == (columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)


def test_runs_that_pycocotools_would_write_beyond_its_memory_are_refused():
    def read(counts):
        size = [1, sum(counts)]
        return parse_rle(segmentation_to_rle(json.dumps({"size": size, "counts": counts}).encode(), *size))

    long = 2**24
    for counts in ([long] * 3, [1, long, long, 2 * long]):
        assert read(counts).tolist() == counts
    with pytest.raises(DatasetError, match="differ by as many"):
        read([long, long, long, 2 * long])


def test_empty_runs_do_not_loosen_the_box():
    mask = np.zeros((6, 5), np.uint8)
    mask[2:4, 3] = 1
    with_empty = [0, 0, 12, 0, 8, 1, 0, 1, 8]
    rle = segmentation_to_rle(text({"size": [6, 5], "counts": with_empty}), 6, 5)
    assert rle == mask_to_rle(mask)
    as_text = coco_mask.frPyObjects({"size": [6, 5], "counts": with_empty}, 6, 5)["counts"].decode()
    assert segmentation_to_rle(text({"size": [6, 5], "counts": as_text}), 6, 5) == mask_to_rle(mask)
    assert segmentation_to_rle(text({"size": [1, 3], "counts": [0, 0, 0, 3]}), 1, 3) == mask_to_rle(np.ones((1, 3)))


coordinates = st.floats(-60, 120, width=32) | st.integers(-60, 120)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools under NumPy 2
@given(st.lists(st.lists(st.tuples(coordinates, coordinates), min_size=3, max_size=12), min_size=1, max_size=3))
@settings(max_examples=60)
def test_polygons_as_pycocotools_fills_them(points):
    polygons = [[float(value) for point in polygon for value in point] for polygon in points]
    expected = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, 50, 70)))
    if expected.any():
        np.testing.assert_array_equal(mask_of(polygons, 50, 70), expected)
    else:
        with pytest.raises(DatasetError, match="covers no pixel"):
            mask_of(polygons, 50, 70)


def test_flat_polygon_is_one_polygon():
    square = [10.0, 10, 20, 10, 20, 20, 10, 20]
    np.testing.assert_array_equal(mask_of(square, 40, 40), mask_of([square], 40, 40))


def test_a_line_beside_a_polygon_is_dropped():
    square = [10, 10, 20, 10, 20, 20, 10, 20]
    np.testing.assert_array_equal(mask_of([[1, 1, 30, 30], square], 40, 40), mask_of([square], 40, 40))


SQUARE = {"size": [10, 10]}


@pytest.mark.parametrize(
    ("segmentation", "words"),
    [
        ([], "fewer than three points"),
        ([[]], "fewer than three points"),
        ([[1, 1, 5, 5]], "fewer than three points"),
        ([1, 1, 5, 5], "fewer than three points"),
        ([[1, 1, 5, 5, 5, 1, 3]], "odd number"),
        ([[[1, 1], [5, 5], [5, 1]]], "neither polygons"),
        ([["1", 1, 5, 5, 5, 1]], "neither polygons"),
        ([[None, 1, 5, 5, 5, 1]], "neither polygons"),
        ([[1e30, 1, 5, 5, 5, 1]], "far outside"),
        ([[-1e9, -1e9, 1e9, -1e9, 1e9, 1e9]], "far outside"),
        ([[0, 0, 1e6, 0, 0, 1e6]], "outline of"),
        ([[0, 0, 160, 0] * 7000], "outline of"),
        ([[20, 20, 30, 20, 30, 30]], "covers no pixel"),
        (None, "neither polygons"),
        ("abc", "neither polygons"),
        ({}, "neither polygons"),
        ({"size": [10, 10]}, "neither polygons"),
        ({"size": [10], "counts": [100]}, "neither polygons"),
        ({"size": [10, 20], "counts": [0, 200]}, "mask of 20x10 in an image of 10x10"),
        (SQUARE | {"counts": [0, 99]}, "do not add up"),
        (SQUARE | {"counts": [0, 101]}, "do not add up"),
        (SQUARE | {"counts": [-1, 101]}, "do not add up"),
        (SQUARE | {"counts": [2**63 - 1, 2**63 - 1, 102]}, "do not add up"),
        (SQUARE | {"counts": [2**70]}, "damaged"),
        (SQUARE | {"counts": [4294967296 + 100]}, "do not add up"),
        (SQUARE | {"counts": [50.5, 49.5]}, "neither polygons"),
        (SQUARE | {"counts": []}, "do not add up"),
        (SQUARE | {"counts": ""}, "damaged"),
        (SQUARE | {"counts": "o" * 9}, "damaged"),
        (SQUARE | {"counts": "PPPPPPP0"}, "damaged"),
        (SQUARE | {"counts": "é"}, "damaged"),
        (SQUARE | {"counts": "0\n"}, "damaged"),
        (SQUARE | {"counts": "oo1"}, "do not add up"),
        (SQUARE | {"counts": [100]}, "covers no pixel"),
    ],
)
def test_refused(segmentation, words):
    with pytest.raises(DatasetError, match=words) as error:
        segmentation_to_rle(text(segmentation), 10, 10)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("raw", [b"", b"[" * 100_000, b"[1e999, 1, 2, 3, 4, 5]", b"[[NaN, 1, 2, 3, 4, 5]]"])
def test_refused_text(raw):
    with pytest.raises(DatasetError):
        segmentation_to_rle(raw, 10, 10)


@given(st.text(st.characters(min_codepoint=48, max_codepoint=111), max_size=30))
@settings(max_examples=100)
def test_any_text_is_a_mask_of_the_size_or_an_error(counts):
    try:
        rle = segmentation_to_rle(text({"size": [7, 5], "counts": counts}), 7, 5)
    except DatasetError:
        return
    assert 0 < rle_to_mask(rle, 7, 5).sum() <= 35


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.sampled_from(["size", "counts", "x"]), inner),
    max_leaves=10,
)


@given(json_values)
@settings(max_examples=100)
def test_any_json_is_a_mask_or_an_error(value):
    try:
        rle = segmentation_to_rle(text(value), 8, 9)
    except DatasetError:
        return
    assert 0 < rle_to_mask(rle, 8, 9).sum() <= 72
