from functools import partial

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import tv_tensors

from sam_cache.data import Views, crop_rle, mask_to_rle, measure_rle, parse_views, rle_to_mask
from sam_cache.data.move import PADDING, Move
from sam_cache.errors import ImageError, UsageError
from sam_cache.types import IDENTITY_TRANSFORM, ImageRecord

sides = st.integers(1, 12)
tiles = st.integers(1, 14).flatmap(lambda side: st.tuples(st.just(side), st.integers(0, side - 1)))
all_views = st.builds(
    Views, identity=st.booleans(), hflip=st.booleans(), lsj=st.integers(0, 5), tile=st.none() | tiles
).filter(str)


def record(height, width, id=7):
    return ImageRecord(id, "a.png", height, width, "train")


def numbered(height, width):
    """An image whose pixels all differ, up to 65,536 of them."""
    high, low = np.divmod(np.arange(height * width).reshape(height, width), 256)
    return np.stack([high, low, 0 * low], axis=2).astype(np.uint8)


def place(transform, x, y):
    a, b, c, d, e, f = transform
    return a * x + b * y + c, d * x + e * y + f


@given(all_views)
def test_text_and_views_agree(views):
    assert parse_views(str(views)) == views


def test_order_and_blanks_do_not_matter():
    views = parse_views(" tile:8:2, lsj:03,hflip ,identity")
    assert views == Views(True, True, 3, (8, 2))
    assert str(views) == "identity,hflip,lsj:3,tile:8:2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "views '': unknown"),
        ("identity,,hflip", "views '': unknown"),
        ("identity,flip", "'flip': unknown; did you mean hflip"),
        ("tiles:64:8", "'tiles:64:8': unknown; did you mean tile"),
        ("hflip,hflip", "'hflip': hflip is given twice"),
        ("lsj:2,lsj:3", "'lsj:3': lsj is given twice"),
        ("identity:2", "'identity:2': takes no number; write identity"),
        ("lsj", "'lsj': write it such as lsj:4"),
        ("lsj:-1", "'lsj:-1': write it such as lsj:4"),
        ("lsj:2.5", "'lsj:2.5': write it such as lsj:4"),
        ("lsj:0", "'lsj:0': 0 of it is none"),
        ("tile:64", "'tile:64': write it such as tile:"),
        ("tile:0:0", "'tile:0:0': 0 of it is none"),
        ("tile:64:64", "'tile:64:64': neighbours overlap by less than a tile"),
    ],
)
def test_texts_that_mean_nothing(text, message):
    with pytest.raises(UsageError, match=message):
        parse_views(text)


def test_what_one_has_and_another_lacks():
    held = parse_views("hflip,lsj:2,tile:8:2")
    assert held.first == "hflip"
    assert [name for name in ("identity", "hflip", "lsj/1", "lsj/2", "tile/9") if held.has(name)] == [
        "hflip",
        "lsj/1",
        "tile/9",
    ]
    assert held.lacks(parse_views("lsj:1,tile:8:2")) == []
    assert held.lacks(parse_views("identity,hflip,lsj:3,tile:8:3")) == ["identity", "lsj:3", "tile:8:3"]


def test_the_image_itself_is_left_as_it_is():
    image = numbered(5, 7)
    (view,) = parse_views("identity").of(record(5, 7))
    assert view.show(image) is image
    assert view.carry(b"whatever") == b"whatever"
    assert view.record(record(5, 7)) == record(5, 7)
    assert view.transform == IDENTITY_TRANSFORM


@given(sides, sides)
def test_mirrored_twice_is_the_image(height, width):
    image = numbered(height, width)
    mask = mask_to_rle(image[:, :, 1] % 3 == 0)
    (view,) = parse_views("hflip").of(record(height, width))
    assert np.array_equal(view.show(image), image[:, ::-1])
    assert np.array_equal(view.show(view.show(image)), image)
    assert view.carry(view.carry(mask)) == mask
    assert place(view.transform, *place(view.transform, 3, 2)) == (3, 2)


@settings(max_examples=60)
@given(sides, sides, tiles, st.data())
def test_every_pixel_goes_where_the_transform_says_and_masks_with_it(height, width, tile, data):
    image = numbered(height, width)
    mask = np.random.default_rng(data.draw(st.integers(0, 99))).random((height, width)) < 0.1
    mask[data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))] = True
    for view in Views(identity=True, hflip=True, tile=tile).of(record(height, width)):
        shown, of_view = view.show(image), view.record(record(height, width))
        assert shown.shape == (of_view.height, of_view.width, 3)
        expected = np.zeros(shown.shape[:2], bool)
        seen = 0
        for y in range(height):
            for x in range(width):
                column, row = place(of_view.transform, x + 0.5, y + 0.5)
                if 0 <= column < of_view.width and 0 <= row < of_view.height:
                    seen += 1
                    assert (shown[int(row), int(column)] == image[y, x]).all()
                    expected[int(row), int(column)] = mask[y, x]
        assert seen == expected.size
        carried = view.carry(mask_to_rle(mask))
        assert (carried is not None) == expected.any()
        if carried is not None:
            assert np.array_equal(rle_to_mask(carried, of_view.height, of_view.width), expected)
        box = measure_rle(mask_to_rle(mask), height, width)[0]
        assert view.cuts(box) == (expected.sum() < mask.sum())


@settings(max_examples=60)
@given(sides, sides, all_views, st.integers(0, 999))
def test_a_mask_is_carried_as_if_all_of_it_were_moved(height, width, views, seed):
    """Held against the whole mask, moved as torchvision moves it."""
    random = np.random.default_rng(seed)
    mask = random.random((height, width)) < random.choice([0.02, 0.5])
    mask[random.integers(height), random.integers(width)] = True
    rle = mask_to_rle(mask)
    box, crop = measure_rle(rle, height, width)[0], partial(crop_rle, rle, height, width)
    for view in views.of(record(height, width, seed)):
        moved = tv_tensors.Mask(torch.from_numpy(mask.astype(np.uint8))[None])
        moved = (view.move.apply(moved) if view.move else moved)[0].numpy()
        expected = mask_to_rle(moved) if moved.any() else None
        assert view.carry(rle) == view.carry(rle, box, crop) == expected


def test_an_object_outside_of_a_view_is_not_decoded():
    mask = np.zeros((64, 64), bool)
    mask[10:14, 20:24] = True
    rle, asked = mask_to_rle(mask), []

    def crop():
        asked.append(view.name)
        return crop_rle(rle, 64, 64)

    views = parse_views("identity,hflip,tile:16:0").of(record(64, 64))
    found = {}
    for view in views:
        found[view.name] = view.carry(rle, (20.0, 10.0, 4.0, 4.0), crop)
    assert asked == ["hflip", "tile/1"]
    assert [name for name, carried in found.items() if carried] == ["identity", "hflip", "tile/1"]


@given(st.integers(0, 40), st.integers(0, 40), all_views)
def test_views_are_counted_without_being_made(height, width, views):
    assert views.count(height, width) == len(views.of(record(height, width)))


def test_views_that_fit_no_memory_are_counted_too():
    assert parse_views("identity,tile:8:7").count(300, 300) == 1 + 293**2
    assert parse_views("tile:2:1").count(100_001, 100_001) == 10**10


@given(st.integers(1, 300), st.integers(1, 300), st.integers(9, 400), st.integers(0, 8))
def test_tiles_cover_the_image_and_end_at_its_border(height, width, side, overlap):
    seen = np.zeros((height, width), int)
    boxes = []
    for view in Views(tile=(side, overlap)).of(record(height, width)):
        (_, _, c, _, _, f), of_view = view.transform, view.record(record(height, width))
        boxes.append((int(-f), int(-c)))
        assert (of_view.height, of_view.width) == (min(side, height), min(side, width))
        seen[-int(f) : -int(f) + of_view.height, -int(c) : -int(c) + of_view.width] += 1
        assert 0 <= -f <= height - of_view.height
        assert 0 <= -c <= width - of_view.width
    assert seen.min() >= 1
    assert boxes == sorted(boxes)  # row by row
    for starts, length in (({top for top, _ in boxes}, height), ({left for _, left in boxes}, width)):
        steps = np.diff(sorted(starts))
        assert (steps[:-1] == side - overlap).all()  # but for the last, which was moved back
        assert (steps <= side - overlap).all()
        assert max(starts) == max(0, length - side)


def test_jittered_views_are_the_same_for_everyone_and_all_differ():
    views = parse_views("lsj:4")
    first, again = views.of(record(50, 60)), views.of(record(50, 60))
    assert [view.name for view in first] == ["lsj/0", "lsj/1", "lsj/2", "lsj/3"]
    assert first == again
    assert len({view.move for view in first}) == 4
    assert parse_views("identity,lsj:2").of(record(50, 60))[1:] == first[:2]  # more of them leave the first as they are
    assert views.of(record(50, 60, id=8))[0].move != first[0].move


def test_jittered_views_do_not_change_with_a_new_version():
    """Stores are grown by later versions."""
    moves = [view.move for view in parse_views("lsj:4").of(record(50, 60))]
    assert [(move.mirror, move.window, move.size, move.canvas) for move in moves] == [
        (True, (0, 0, 50, 60), (31, 37), (60, 60)),
        (False, (0, 0, 50, 60), (36, 43), (60, 60)),
        (False, (5, 8, 36, 36), (36, 36), (36, 36)),
        (True, (4, 6, 44, 44), (44, 44), (44, 44)),
    ]


def test_jittered_views_are_half_mirrored_and_scaled_evenly():
    moves = [view.move for id in range(200) for view in parse_views("lsj:2").of(record(1000, 800, id))]
    assert 160 < sum(move.mirror for move in moves) < 240
    assert all(move.canvas[0] == move.canvas[1] for move in moves)  # a square, as HQ-SAM pads to
    scales = np.array([move.size[0] / move.window[2] * 1000 / move.canvas[0] for move in moves])
    assert 0.1 <= scales.min() < 0.15
    assert 1.9 < scales.max() <= 2
    assert 150 < (scales < 1).sum() < 230  # 9 of 19


@settings(max_examples=60)
@given(st.integers(2, 60), st.integers(2, 60), st.integers(0, 1000))
def test_jittered_masks_are_those_at_the_middles_of_the_pixels(height, width, id):
    mask = np.random.default_rng(id).random((height, width)) < 0.3
    mask[height // 2, width // 2] = True
    (view,) = parse_views("lsj:1").of(record(height, width, id))
    side, _ = view.move.canvas
    a, _, c, _, e, f = view.transform
    x, y = (np.arange(side) + 0.5 - c) / a, (np.arange(side) + 0.5 - f) / e
    # Where the middle falls on the edge between two pixels, either is right.
    exact = (np.abs(x - x.round()) > 1e-4)[None] & (np.abs(y - y.round()) > 1e-4)[:, None]
    inside = ((x >= 0) & (x < width))[None] & ((y >= 0) & (y < height))[:, None]
    window = np.zeros((side, side), bool)
    window[: view.move.size[0], : view.move.size[1]] = True
    assert (inside >= window)[exact].all()
    expected = mask[np.clip(y, 0, height - 1).astype(int)[:, None], np.clip(x, 0, width - 1).astype(int)[None]] & window
    carried = view.carry(mask_to_rle(mask))
    found = np.zeros((side, side), bool) if carried is None else rle_to_mask(carried, side, side).astype(bool)
    assert np.array_equal(found & exact, expected & exact)


@settings(max_examples=60)
@given(st.integers(20, 60), st.integers(20, 60), st.integers(0, 1000))
def test_jittered_images_lie_where_their_masks_do(height, width, id):
    mask = np.zeros((height, width), bool)
    mask[height // 4 : height // 2, width // 4 : width // 2] = True
    image = np.repeat(np.where(mask, 255, PADDING).astype(np.uint8)[:, :, None], 3, axis=2)
    (view,) = parse_views("lsj:1").of(record(height, width, id))
    shown, carried = view.show(image), view.carry(mask_to_rle(mask))
    side, _ = view.move.canvas
    assert shown.shape == (side, side, 3)
    assert (shown[view.move.size[0] :] == PADDING).all()
    assert (shown[:, view.move.size[1] :] == PADDING).all()
    if carried is not None:
        found, seen = rle_to_mask(carried, side, side), shown[:, :, 0] > (255 + PADDING) / 2
        kernel = np.ones((3, 3), np.uint8)
        assert (cv2.erode(found, kernel) <= seen).all()
        assert (seen <= cv2.dilate(found, kernel)).all()


def test_an_object_that_shrinks_to_nothing_is_gone():
    mask = np.zeros((60, 60), bool)
    mask[30, 30] = True
    views = [view for id in range(40) for view in parse_views("lsj:1").of(record(60, 60, id)) if view.move.size[0] < 20]
    assert views
    assert any(view.carry(mask_to_rle(mask)) is None for view in views)


def test_an_image_of_unknown_size_has_no_view_but_itself():
    views = parse_views("identity,hflip,lsj:2,tile:8:2").of(record(0, 0))
    assert [view.name for view in views] == ["identity", "hflip", "lsj/0", "lsj/1", "tile/0"]
    assert views[0].show(numbered(3, 4)).shape == (3, 4, 3)
    for view in views[1:]:
        assert (view.record(record(0, 0)).height, view.record(record(0, 0)).view) == (0, view.name)
        with pytest.raises(ImageError, match=f"a.png: has no view {view.name}, since its record has no size"):
            view.show(numbered(3, 4))


@pytest.mark.parametrize("quarters", range(4))
@pytest.mark.parametrize("upend", [False, True])
def test_turns_have_a_transform_too(quarters, upend):
    height, width = 4, 6
    turned = (width, height) if quarters % 2 else (height, width)
    move = Move(True, upend, quarters, (1, 1, 2, 3), (2, 3), (2, 3))
    image = numbered(height, width)
    shown = move.apply(tv_tensors.Image(np.ascontiguousarray(image.transpose(2, 0, 1)))).permute(1, 2, 0).numpy()
    assert turned[0] >= 3
    for y in range(height):
        for x in range(width):
            column, row = place(move.transform(height, width), x + 0.5, y + 0.5)
            if 0 <= column < 3 and 0 <= row < 2:
                assert (shown[int(row), int(column)] == image[y, x]).all()
