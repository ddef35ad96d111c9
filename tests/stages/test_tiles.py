"""Tiles of an image, and masks put together from them."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sam_cache.data import Views
from sam_cache.stages.tiles import lay_tiles, paste, unite
from sam_cache.types import ImageRecord

sides = st.integers(1, 40)
kinds = st.integers(2, 50).flatmap(lambda side: st.tuples(st.just(side), st.integers(0, side - 1)))


def layout(height, width, tile):
    record = ImageRecord(0, "a.png", height, width)
    shown = [view.record(record) for view in Views(tile=tile).of(record)]
    boxes = [(-int(view.transform[2]), -int(view.transform[5]), view.width, view.height) for view in shown]
    return lay_tiles(boxes)


def parts_of(mask, tiles):
    return [(tile, mask[tile.shown]) for tile in tiles]


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
    assert np.array_equal(unite(parts), mask)
    assert np.array_equal(paste(parts), mask)


def test_where_tiles_disagree_each_counts_on_its_own_pixels():
    left, right = layout(4, 16, (10, 4))  # columns 0 to 10 and 6 to 16
    nothing, everything = np.zeros((4, 10), bool), np.ones((4, 10), bool)
    assert paste([(left, everything), (right, nothing)]).sum(axis=1).tolist() == [8] * 4
    assert paste([(left, nothing), (right, everything)])[0].tolist() == [False] * 8 + [True] * 8
    assert not paste([(left, nothing)]).any()
    assert unite([(left, everything), (right, nothing)]).sum() == 40
