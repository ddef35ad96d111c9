"""Runs against the masks that they came from."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from sam_cache.data.crops import MaskCrop
from sam_cache.data.rle import mask_to_rle, parse_rle
from sam_cache.data.runs import ColumnRuns, column_runs
from sam_cache.errors import DatasetError

MASKS = arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=40))


def painted(runs, height, width):
    mask = np.zeros((height, width), int)
    for column, top, bottom in zip(runs.columns, runs.tops, runs.bottoms, strict=True):
        mask[top:bottom, column] += 1
    return mask


@given(MASKS, st.integers(1, 5))
def test_runs_paint_the_masks_they_were_read_from(mask, count):
    masks = [mask, ~mask, np.zeros_like(mask), np.ones_like(mask), mask][:count]
    runs = column_runs([mask_to_rle(each) for each in masks], *mask.shape)
    assert len(runs) == count
    for place, each in enumerate(masks):
        alone = runs.only(place)
        assert np.array_equal(painted(alone, *mask.shape), each)
        assert alone.area == each.sum()
        keys = alone.columns * 1000 + alone.tops
        assert (np.diff(keys) > 0).all()


def test_no_texts_are_no_runs():
    runs = column_runs([], 5, 5)
    assert len(runs) == 0
    assert runs.area == 0


@given(st.lists(st.integers(1, 10**8), min_size=2, max_size=9))
def test_numbers_of_any_length_are_read(lengths):
    from pycocotools import mask as coco_mask

    lengths = [1, *lengths]  # of numbers that all take six characters pycocotools writes a byte beyond its memory
    height, width = 1, sum(lengths)
    text = coco_mask.frPyObjects({"size": [height, width], "counts": lengths}, height, width)["counts"]
    runs = column_runs([text, text], width, 1)  # as one column: a run of it stays one
    ends = parse_rle(text).cumsum()
    for place in range(2):
        assert runs.only(place).tops.tolist() == ends[0 : len(ends) // 2 * 2 : 2].tolist()
        assert runs.only(place).bottoms.tolist() == ends[1::2].tolist()


@given(MASKS, st.sampled_from([np.int64, np.uint8]))
def test_crops_and_pixels_are_those_of_the_mask(mask, dtype):
    """The pixels by number are those that counting them row by row finds, whatever the runs are kept in."""
    if not mask.any():
        return
    runs = column_runs([mask_to_rle(mask)], *mask.shape)
    runs = ColumnRuns(*(part.astype(dtype) for part in (runs.columns, runs.tops, runs.bottoms)), runs.offsets)
    crop, expected = runs.crop(), MaskCrop.of(mask)
    assert (crop.left, crop.top, crop.mask.dtype) == (expected.left, expected.top, np.uint8)
    assert np.array_equal(crop.mask, expected.mask)
    y, x = np.nonzero(mask)
    numbers = np.random.default_rng(0).permutation(len(y))
    assert np.array_equal(runs.pixels(numbers), np.stack([x, y], axis=1)[numbers])


@pytest.mark.parametrize("text", [b"", b"\x00", b"P", b"5P", b"5~", b"PPPPPPPP1", b"5O", b"9999", b"\xff1"])
def test_damaged_text_is_refused_wherever_it_stands(text):
    good = mask_to_rle(np.eye(4, dtype=bool))
    for texts in ([text], [good, text], [text, good], [good, text, good]):
        with pytest.raises(DatasetError, match="run-length text is damaged"):
            column_runs(texts, 4, 4)
