"""What an annotator delivers, however it comes by it: anew, from what it knows, one by one, or on used canvases."""

import pickle
from itertools import islice

import numpy as np
import pytest
import torch

from sam_cache.batches import Annotator, CachedBatches, Order, Places, Preprocessing, Sampling, Visit, object_columns
from sam_cache.batches.annotations import Annotation
from sam_cache.batches.canvas import Canvas
from sam_cache.batches.known_masks import KnownMask, KnownMasks
from sam_cache.data import Geometry, Patch, column_runs, coverage, mask_to_rle, open_dataset, parse_prompts
from sam_cache.data.targets import cover
from sam_cache.store import EmbeddingStore, LevelSpec, StoreSpec

CELLS, ROWS = 32, 9
HOW = Preprocessing(4 * CELLS)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Nine scenes; the objects of the third and the last are missing."""
    scenes = open_dataset("synthetic", count=ROWS, size=120)
    spec = StoreSpec("none", "00" * 32, {"neck": LevelSpec(2, 4, 4, "fp32", "raw")}, "fp32", vars(HOW))

    def prepare(_):
        return object_columns(scenes, ((row, row) for row in range(ROWS - 1) if row != 2))

    path = tmp_path_factory.mktemp("annotator") / "rows.zarr"
    store = EmbeddingStore.create_or_resume(path, spec, scenes.images, prepare, b"none", {}, {})
    for shard in store.uncommitted():
        with store.writing(shard) as writer:
            for row in shard.rows:
                writer.append(row, {"neck": np.full((2, 4, 4), row, np.float32)}, content="00" * 32)
    return store


def annotator(store, text="box,point,noise-mask,interior", known_bytes=0, objects=None, **options):
    sampling = Sampling(parse_prompts(text), seed=5, training=True, **options)
    return Annotator(store.images, objects or store.objects(), HOW, CELLS, sampling, known_bytes)


def visits(*rows, epoch=0):
    return [Visit(row, epoch) for row in rows]


def same(one: Annotation, other: Annotation) -> bool:
    pairs = [(vars(one.prompts), vars(other.prompts)), (vars(one.targets), vars(other.targets))]
    equal = [
        (ours[name] is None and theirs[name] is None) or torch.equal(ours[name], theirs[name])
        for ours, theirs in pairs
        for name in ours
    ]
    return all(equal) and np.array_equal(one.objects, other.objects)


def test_a_batch_is_its_rows_one_by_one(store):
    found, rows = annotator(store), (4, 2, 0, 7, 8, 1)
    together = found.annotate(visits(*rows))
    assert len(together.objects) > 20
    assert same(together, Annotation.join([found.annotate(visits(row)) for row in rows]))


def test_masks_are_those_of_the_objects(store):
    objects, found = store.objects(), annotator(store).annotate(visits(*range(ROWS)))
    assert np.array_equal(np.sort(found.objects), np.arange(len(objects["row"])))
    for mask, number in zip(found.targets.masks.numpy(), found.objects.tolist(), strict=True):
        row = int(objects["row"][number])
        geometry = Geometry(int(store.images.heights[row]), int(store.images.widths[row]), 4 * CELLS)
        assert np.array_equal(mask, coverage(objects["rle"][number], geometry, CELLS))


@pytest.mark.parametrize("known_bytes", [20_000, 10**9])
def test_what_is_known_changes_nothing_but_the_work(store, known_bytes, monkeypatch):
    plain, knowing = annotator(store), annotator(store, known_bytes=known_bytes)
    batches = [visits(*rows, epoch=epoch) for epoch in range(3) for rows in ((0, 1, 2, 3), (8, 7, 6), (5, 4))]
    expected, made = [plain.annotate(batch) for batch in batches], []

    def counting(runs, *how):
        made.append(len(runs))
        return cover(runs, *how)

    monkeypatch.setattr("sam_cache.batches.annotations.cover", counting)
    for batch, each in zip(batches, expected, strict=True):
        assert same(knowing.annotate(batch), each)
        assert knowing._known.nbytes <= known_bytes
    count = len(store.objects()["row"])
    assert sum(made) == count if known_bytes > 10**6 else count < sum(made) < 3 * count


def test_chosen_objects_alone_are_made_and_known(store):
    few = annotator(store, known_bytes=10**9, max_objects=2)
    whole = annotator(store, max_objects=2)
    for epoch in range(4):
        assert same(few.annotate(visits(0, 1, epoch=epoch)), whole.annotate(visits(0, 1, epoch=epoch)))
    assert 0 < len(few._known._entries) <= 2 * 2 * 4


def test_a_used_canvas_is_as_good_as_a_new_one(store):
    found = annotator(store)
    canvas = found.canvas()
    for rows in ((0, 1, 3), (4,), (5, 6, 7, 0, 1), (2,), (2, 8), (3, 4)):
        assert same(found.annotate(visits(*rows), canvas), found.annotate(visits(*rows)))


def test_targets_are_drawn_into_the_same_memory():
    canvas = Canvas(8)
    first = canvas.draw([Patch(1, 2, np.ones((3, 4), np.float32))] * 4, [Geometry(8, 8, 8)], np.ones(4, np.float32))
    place = first.masks.data_ptr()
    second = canvas.draw([Patch(0, 0, np.zeros((0, 0), np.float32))], [Geometry(8, 4, 8)], np.ones(1, np.float32))
    assert second.masks.data_ptr() == place
    assert not first.masks.any()
    assert second.valid[0].sum() == 32


def test_batches_keep_their_targets_as_long_as_their_levels(store):
    """Until `keep` further batches were drawn, whatever the threads draw ahead."""
    for keep in (1, 3):
        found = annotator(store, known_bytes=10**9)
        stream = CachedBatches(store, found, Order(np.arange(ROWS), seed=0), batch_size=2, threads=2, keep=keep)
        held: list = []
        for batch in islice(stream, 30):
            held = [*held, batch][-keep:]
            for each in held:
                alone = annotator(store).annotate(visits(*each.rows.tolist()))  # in any epoch the targets are these
                assert torch.equal(each.targets.masks, alone.targets.masks)
                assert torch.equal(each.targets.valid, alone.targets.valid)
                assert torch.equal(each.levels["neck"][:, 0, 0, 0], torch.from_numpy(each.rows).float())
        assert len({each.targets.masks.data_ptr() for each in held}) == keep


def test_known_masks_give_back_the_same_bits_and_begin_empty_elsewhere():
    random, known = np.random.default_rng(0), KnownMasks(10**6)
    masks = [random.random((50, 40)) < share for share in (0.01, 0.5, 1.0)] + [np.zeros((50, 40), bool)]
    runs = column_runs([mask_to_rle(mask) for mask in masks], 50, 40)
    for place, patch in enumerate(cover(runs, Geometry(50, 40, 128), CELLS)):
        known.keep(place, KnownMask(patch, runs.only(place)))
        found = known.get(place)
        assert (found.patch.top, found.patch.left) == (patch.top, patch.left)
        assert found.patch.cells.dtype == np.float32
        assert np.array_equal(found.patch.cells, patch.cells)
        if masks[place].any():
            assert np.array_equal(found.runs.crop().mask, runs.only(place).crop().mask)
    assert known.get(99) is None
    assert 4 * 1000 < known.nbytes < 4 * 50 * 40 * 4
    copy = pickle.loads(pickle.dumps(known))
    assert copy.get(0) is None
    assert copy.nbytes == 0


def test_nothing_is_known_beyond_the_limit():
    known = KnownMasks(4000)
    for place in range(10):
        known.keep(place, KnownMask(Patch(0, 0, np.eye(3, dtype=np.float32)), None))
    assert known.nbytes <= 4000
    assert [known.get(place) is not None for place in range(4)] == [True, True, False, False]


def test_rows_are_found_in_columns_in_any_order(store):
    objects = store.objects()
    shuffled = np.random.default_rng(0).permutation(len(objects["row"]))
    mixed = {name: column[shuffled] for name, column in objects.items() if name != "rle"}
    mixed["rle"] = [objects["rle"][place] for place in shuffled]
    ours, theirs = annotator(store), annotator(store, objects=mixed)
    assert ours.has_objects(np.arange(ROWS)).tolist() == [row not in (2, 8) for row in range(ROWS)]
    assert theirs.has_objects(np.arange(ROWS)).tolist() == ours.has_objects(np.arange(ROWS)).tolist()
    assert 0 in ours
    assert 2 not in ours
    assert 99 not in ours
    for row in range(ROWS):
        one, other = ours.annotate(visits(row)), theirs.annotate(visits(row))
        assert sorted(one.objects.tolist()) == sorted(shuffled[other.objects].tolist())


def test_crowds_and_masks_without_a_pixel_are_not_asked_for(store):
    objects = dict(store.objects())
    objects["iscrowd"], objects["area"] = objects["iscrowd"].copy(), objects["area"].copy()
    of_first = np.flatnonzero(objects["row"] == 0)
    objects["iscrowd"][of_first[0]], objects["area"][of_first[1]] = True, 0
    assert annotator(store, objects=objects).annotate(visits(0)).objects.tolist() == of_first[2:].tolist()


@pytest.mark.parametrize("column", [[0, 1, 2, 5], [5, 0, 2, 1], [3, 3, 3], [7, 7, 1, 1, 7], [4]])
def test_places_are_those_a_dictionary_would_give(column):
    column = np.array(column)
    places = Places(column)
    for number in range(9):
        start, stop = (each.item() for each in places.ranges(np.array([number])))
        assert places.places[start:stop].tolist() == np.flatnonzero(column == number).tolist()
        if number in column:
            assert places.of(np.array([number])).tolist() == np.flatnonzero(column == number)[:1].tolist()
        else:
            with pytest.raises(KeyError, match=str(number)):
                places.of(np.array([column[0], number]))
