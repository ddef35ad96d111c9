"""Tiles of an image, and masks put together from them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sam_cache.data import Geometry, MaskCrop, Views, crop_rle, mask_to_rle
from sam_cache.stages.tiles import Reply, join_tiles, lay_tiles, paste, unite
from sam_cache.types import ImageRecord, Prompts

sides = st.integers(1, 40)
kinds = st.integers(2, 50).flatmap(lambda side: st.tuples(st.just(side), st.integers(0, side - 1)))


def layout(height, width, tile):
    record = ImageRecord(0, "a.png", height, width)
    shown = [view.record(record) for view in Views(tile=tile).of(record)]
    boxes = [(-int(view.transform[2]), -int(view.transform[5]), view.width, view.height) for view in shown]
    return lay_tiles(boxes)


def parts_of(mask, tiles):
    return [(tile, MaskCrop.of(mask[tile.shown])) for tile in tiles]


@settings(deadline=None)
@given(sides, sides, kinds)
def test_every_pixel_belongs_to_the_tile_whose_border_is_farthest(height, width, kind):
    tiles = layout(height, width, kind)
    owners = np.zeros((height, width), int)
    for tile in tiles:
        assert tile.size == (height, width)
        owners[tile.own] += 1
    assert (owners == 1).all()
    for axis, length in enumerate((height, width)):
        spans = {(tile.shown[axis].start, tile.shown[axis].stop): tile.own[axis] for tile in tiles}
        for place in range(length):
            # How far the tile goes on beyond the pixel, where the image does.
            depth = {
                span: min(
                    place - start if start else length, (stop - 1 - place) if stop < length else length
                )
                for span in spans
                for start, stop in [span]
                if start <= place < stop
            }  # fmt: skip
            (owner,) = [span for span, own in spans.items() if own.start <= place < own.stop]
            assert depth[owner] >= max(depth.values()) - 1  # of an odd overlap the middle pixel goes either way


@settings(deadline=None)
@given(sides, sides, kinds, st.integers(0, 99))
def test_a_mask_cut_in_tiles_is_put_together_exactly(height, width, kind, seed):
    mask = np.random.default_rng(seed).random((height, width)) < 0.4
    parts = parts_of(mask, layout(height, width, kind))
    assert np.array_equal(unite(parts).whole(height, width), mask)
    assert np.array_equal(paste(parts).whole(height, width), mask)


def test_where_tiles_disagree_each_counts_on_its_own_pixels():
    left, right = layout(4, 16, (10, 4))  # columns 0 to 10 and 6 to 16
    nothing, everything = MaskCrop.of(np.zeros((4, 10), bool)), MaskCrop.of(np.ones((4, 10), bool))
    assert paste([(left, everything), (right, nothing)]).whole(4, 16).sum(axis=1).tolist() == [8] * 4
    assert paste([(left, nothing), (right, everything)]).whole(4, 16)[0].tolist() == [False] * 8 + [True] * 8
    assert not paste([(left, nothing)]).whole(4, 16).any()
    assert unite([(left, everything), (right, nothing)]).whole(4, 16).sum() == 40


def reply(tile, truth, score):
    """To a prompt for an object that is `truth` (a mask of the image) in this tile, where there is no prompt."""
    prompts = Prompts(
        image_index=torch.zeros(1, dtype=torch.long),
        kind=torch.zeros(1, dtype=torch.long),
        points_xy_input=torch.zeros(0, 2),
        labels=torch.zeros(0, dtype=torch.long),
        offsets=torch.zeros(2, dtype=torch.long),
        boxes_xyxy_input=torch.zeros(1, 4),
        has_box=torch.zeros(1, dtype=torch.bool),
        has_mask=torch.zeros(1, dtype=torch.bool),
        chance=torch.zeros(1, 2),
    )
    mask = MaskCrop.of(truth[tile.shown])
    rows, columns = truth[tile.shown].shape
    geometry = Geometry(rows, columns, 16, "longest")
    return Reply(3, 7, 1, geometry, prompts, mask, {"untouched": mask}, {"untouched": score})


def test_a_score_weighs_by_what_of_the_object_is_the_tiles_own():
    left, right = layout(4, 16, (10, 4))  # the left one owns columns 0 to 8
    truth = np.zeros((4, 16), bool)
    truth[:, 2:9] = True  # 7 columns in the left tile, 6 of them its own; 3 in the right one, 1 its own
    (joined,) = join_tiles([(left, [reply(left, truth, 0.9)]), (right, [reply(right, truth, 0.2)])])
    assert joined.predicted["untouched"] == pytest.approx((6 * 0.9 + 1 * 0.2) / 7)
    assert np.array_equal(joined.truth.whole(4, 16), truth)
    assert np.array_equal(joined.masks["untouched"].whole(4, 16), truth)


def test_a_part_that_is_no_tiles_own_is_scored_all_the_same():
    left, _ = layout(4, 16, (10, 4))
    truth = np.zeros((4, 16), bool)
    truth[:, 9] = True
    (joined,) = join_tiles([(left, [reply(left, truth, 0.9)])])
    assert joined.predicted["untouched"] == pytest.approx(0.9)
    assert not joined.masks["untouched"].whole(4, 16).any()


windows = st.tuples(st.integers(0, 12), st.integers(0, 12)).map(lambda ends: slice(*sorted(ends)))


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), windows, windows, st.floats(0, 1), st.integers(0, 99))
def test_a_crop_is_its_mask(height, width, rows, columns, share, seed):
    mask = np.random.default_rng(seed).random((height, width)) < share**3
    crop = MaskCrop.of(mask)
    assert np.array_equal(crop.whole(height, width), mask)
    assert np.count_nonzero(crop.mask) == mask.sum()
    if mask.any():
        coded = crop_rle(mask_to_rle(mask), height, width)
        assert (crop.left, crop.top) == (coded.left, coded.top)
        assert np.array_equal(crop.mask, coded.mask)
    inside = np.zeros_like(mask)
    inside[rows, columns] = mask[rows, columns]
    assert np.array_equal(crop.within(rows, columns).whole(height, width), inside)
