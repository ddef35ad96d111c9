import importlib
import time
import tracemalloc
import weakref
from collections import Counter
from dataclasses import replace

import numpy as np
import torch

from sam_cache.batches import Preprocessing, ViewCount, object_columns, pixel_batches
from sam_cache.data import crop_rle, decode, mask_to_rle, measure_rle, parse_views
from sam_cache.data.synthetic import open_synthetic
from sam_cache.types import ImageRecord, ObjectRecord

HOW = Preprocessing(64)
VIEWS = parse_views("identity,hflip,lsj:2,tile:40:8")


def pixels_of(dataset, shown, batch_size=3):
    pairs = [(number, row) for row, (number, _) in enumerate(shown)]
    return list(pixel_batches(dataset, pairs, HOW, batch_size, 3, lambda row: shown[row][1]))


def test_an_image_is_read_once_for_all_its_views():
    scenes = open_synthetic(4, size=64)
    read: Counter[int] = Counter()

    def counting(record):
        read[record.id] += 1
        return scenes.read(record)

    shown = [(number, view) for number, record in enumerate(scenes.images) for view in VIEWS.of(record)]
    found = pixels_of(replace(scenes, read=counting), shown)
    assert read == {0: 1, 1: 1, 2: 1, 3: 1}
    assert [row for batch in found for row in batch.rows] == list(range(len(shown)))
    assert len({hash for batch in found for hash in batch.hashes}) == 4


def test_a_decoded_image_is_let_go_of_with_the_last_row_that_shows_it(monkeypatch):
    module, alive = importlib.import_module("sam_cache.batches.pixels"), weakref.WeakSet()

    class Watched(np.ndarray):
        """An array that can be found again in a set."""

        __hash__ = object.__hash__

        def __eq__(self, other):
            return self is other

    def watching(*arguments):
        found = decode(*arguments)
        image = found.image.view(Watched)
        alive.add(image)
        return replace(found, image=image)

    monkeypatch.setattr(module, "decode", watching)
    scenes = open_synthetic(6, size=96)
    batches = pixel_batches(scenes, [(number, number) for number in range(6)], HOW, batch_size=6, threads=3)
    assert next(batches).rows == list(range(6))
    for _ in range(500):  # a thread drops its work a moment after it has handed over the result
        if alive:
            time.sleep(0.01)
    assert not alive
    assert next(batches, None) is None


def test_a_view_becomes_pixels_as_if_it_were_a_file_of_its_own():
    scenes = open_synthetic(1, size=64)
    image = decode(scenes.read(scenes.images[0]), scenes.images[0]).image
    views = VIEWS.of(scenes.images[0])
    pixels = torch.cat([batch.pixels for batch in pixels_of(scenes, [(0, view) for view in views])])
    for view, got in zip(views, pixels, strict=True):
        shown = view.show(image)
        alone = replace(scenes, images=[ImageRecord(0, "view.ppm")], read=lambda record, shown=shown: to_ppm(shown))
        (batch,) = pixel_batches(alone, [(0, 0)], HOW, 1, 1)
        assert torch.equal(batch.pixels[0], got)


def to_ppm(image):
    return b"P6 %d %d 255\n" % (image.shape[1], image.shape[0]) + image.tobytes()


def test_all_views_of_a_bad_image_fail_for_its_reason():
    scenes = open_synthetic(2, size=64)
    broken = replace(scenes, read=lambda record: scenes.read(record) if record.id else b"no image")
    shown = [(number, view) for number, record in enumerate(scenes.images) for view in VIEWS.of(record)]
    found = pixels_of(broken, shown)
    failures = {row: text for batch in found for row, text in batch.failures.items()}
    assert sorted(failures) == [row for row, (number, _) in enumerate(shown) if number == 0]
    assert len(set(failures.values())) == 1
    assert "not an image" in failures[0]


def test_images_after_one_that_fails_move_up():
    scenes = open_synthetic(5, size=64)
    broken = replace(scenes, read=lambda record: b"no image" if record.id in (1, 3) else scenes.read(record))
    (batch,) = pixel_batches(broken, [(number, number) for number in range(5)], HOW, 8, 2)
    assert batch.rows == [0, 2, 4]
    assert list(batch.failures) == [1, 3]
    assert batch.pixels.shape == (3, 3, 64, 64)
    for row, pixels, hash in zip(batch.rows, batch.pixels, batch.hashes, strict=True):
        (alone,) = pixel_batches(scenes, [(row, row)], HOW, 1, 1)
        assert torch.equal(alone.pixels[0], pixels)
        assert alone.hashes == [hash]


def test_views_of_an_image_of_unknown_size_fail_but_the_image_itself():
    scenes = open_synthetic(1, size=64)
    unknown = replace(scenes, images=[ImageRecord(0, "a.bmp")], read=lambda _: scenes.read(scenes.images[0]))
    (batch,) = pixels_of(unknown, [(0, view) for view in parse_views("identity,hflip").of(unknown.images[0])])
    assert batch.rows == [0]
    assert batch.failures == {1: "a.bmp: has no view hflip, since its record has no size; give it height and width"}


def test_objects_are_measured_in_their_view_and_counted():
    scenes = open_synthetic(2, size=96)
    shown = [(number, view) for number, record in enumerate(scenes.images) for view in VIEWS.of(record)]
    counts: dict[str, ViewCount] = {}
    pairs = [(number, row) for row, (number, _) in enumerate(shown)]
    table = object_columns(scenes, pairs, view_of=lambda row: shown[row][1], counts=counts)
    plain = object_columns(scenes, [(0, 0), (1, len(shown) // 2)])
    originals = sum(len(scenes.objects(number)) for number in range(2))

    identity = np.isin(table["row"], [row for row, (_, view) in enumerate(shown) if view.kind == "identity"])
    for name in plain.keys() - {"row"}:
        ours = [value for value, mine in zip(table[name], identity, strict=True) if mine]
        assert all(np.array_equal(a, b) for a, b in zip(ours, plain[name], strict=True))
    assert counts["identity"] == counts["hflip"] == ViewCount(2, originals)
    for kind, count in counts.items():
        rows = [row for row, (_, view) in enumerate(shown) if view.kind == kind]
        assert count.rows == len(rows)
        assert count.objects == np.isin(table["row"], rows).sum()
        assert count.objects + count.dropped == sum(len(scenes.objects(shown[row][0])) for row in rows)
    assert counts["tile"].clipped > 0
    for index, row in enumerate(table["row"].tolist()):
        size = shown[row][1].record(scenes.images[shown[row][0]])
        x, y, w, h = table["box_xywh_image"][index]
        assert 0 <= x < x + w <= size.width
        assert 0 <= y < y + h <= size.height
        for name in ("centroid_xy_image", "bbox_center_xy_image", "interior_xy_image"):
            assert (table[name][index] >= (x, y)).all()
            assert (table[name][index] < (x + w, y + h)).all()
        assert 0 < table["area"][index] <= w * h


def test_an_object_is_decoded_once_for_all_views_of_its_image(monkeypatch):
    module, decoded = importlib.import_module("sam_cache.batches.object_columns"), Counter()

    def counting(rle, *size):
        decoded[rle] += 1
        return crop_rle(rle, *size)

    monkeypatch.setattr(module, "crop_rle", counting)
    scenes = open_synthetic(2, size=96)
    shown = [(number, view) for number, record in enumerate(scenes.images) for view in VIEWS.of(record)]
    pairs = [(number, row) for row, (number, _) in enumerate(shown)]
    object_columns(scenes, pairs, view_of=lambda row: shown[row][1])
    assert decoded == Counter(found.rle for number in range(2) for found in scenes.objects(number))
    decoded.clear()
    object_columns(scenes, [(0, 0), (1, 1)])
    assert not decoded


def test_objects_take_no_more_room_on_the_way_than_in_the_table():
    scenes = open_synthetic(1, size=64)
    mask = np.zeros((64, 64), bool)
    mask[20:30, 20:30] = True
    rle = mask_to_rle(mask)
    found = ObjectRecord(2**40, 2**40, rle, *measure_rle(rle, 64, 64))
    many = replace(scenes, images=[replace(scenes.images[0], id=id) for id in range(400)],
                   convert=lambda number: ([found] * 10, []))  # fmt: skip
    object_columns(many, [(0, 0)])  # what is made at the first call stays
    tracemalloc.start()
    try:
        table = object_columns(many, ((number, number) for number in range(400)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    size = sum(column.nbytes for name, column in table.items() if name != "rle")
    size += table["rle"].data.nbytes + table["rle"].offsets.nbytes
    assert len(table["row"]) == 4000
    assert peak < 1.5 * size


def test_no_objects_make_columns_of_no_length():
    scenes = replace(open_synthetic(1), convert=lambda number: ([], []))
    table = object_columns(scenes, [(0, 0)])
    assert {len(column) for column in table.values()} == {0}
    assert table["box_xywh_image"].shape == (0, 4)
    assert table["centroid_moved"].dtype == bool
