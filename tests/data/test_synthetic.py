import numpy as np
import pytest

from sam_cache.data import decode, open_dataset, rle_to_mask
from sam_cache.data.shapes import SHAPES
from sam_cache.data.synthetic import LEAST_PIXELS, paint_scene, place_things

SMALL = {"count": 12, "size": 160}


def masks_of(dataset, number):
    record = dataset.images[number]
    return np.stack([rle_to_mask(o.rle, record.height, record.width) for o in dataset.objects(number)])


def test_a_scene_depends_on_seed_and_number_alone():
    dataset, again = open_dataset("synthetic", **SMALL), open_dataset("synthetic", **SMALL | {"count": 5})
    assert again.images == dataset.images[:5]
    for number in (4, 0):  # in another order
        record = dataset.images[number]
        assert again.read(record) == dataset.read(record)
        assert again.objects(number) == dataset.objects(number)
    other = open_dataset("synthetic", **SMALL, seed=1)
    assert other.images[0].path != dataset.images[0].path
    assert other.read(other.images[0]) != dataset.read(dataset.images[0])
    assert open_dataset("synthetic", **SMALL, limit=3).images == dataset.images[:3]


def test_files_decode_to_the_painting():
    dataset = open_dataset("synthetic", **SMALL)
    for number, record in enumerate(dataset.images[:4]):
        decoded = decode(dataset.read(record), record)
        assert decoded.notes == ()
        np.testing.assert_array_equal(decoded.image, paint_scene(0, number, (record.height, record.width)))


def test_masks_are_disjoint_and_in_bounds():
    dataset = open_dataset("synthetic", **SMALL)
    for number, record in enumerate(dataset.images):
        assert 0.59 < record.width / record.height < 1.7
        assert 0.95 < record.width * record.height / 160**2 < 1.05
        masks = masks_of(dataset, number)
        assert 3 <= len(masks) <= 12
        assert masks.sum(0).max() == 1
        for object, mask in zip(dataset.objects(number), masks, strict=True):
            assert object.area == mask.sum() >= LEAST_PIXELS
            assert object.category in dataset.categories
        assert len({object.id for object in dataset.objects(number)}) == len(masks)


def test_each_pixel_belongs_to_the_frontmost_object_that_covers_half_of_it():
    things, owner = place_things(0, 1, (120, 160))
    expected = np.full((120, 160), -1)
    for index, thing in enumerate(things):
        expected[thing.coverage >= 128] = index
    np.testing.assert_array_equal(owner, expected)


def test_masks_lie_where_the_paint_is(monkeypatch):
    """Without its last object a scene changes all over that object, and hardly elsewhere."""
    size = (150, 200)
    things, owner = place_things(3, 0, size)
    full = paint_scene(3, 0, size).astype(int)
    monkeypatch.setattr("sam_cache.data.synthetic.place_things", lambda *_: (things[:-1], owner))
    changed = np.abs(full - paint_scene(3, 0, size)).max(axis=2)
    grain = 8  # is drawn after the objects, so it is another one
    assert np.median(changed[owner == len(things) - 1]) > 2 * grain
    assert np.median(changed[things[-1].coverage == 0]) <= grain


def test_every_shape_comes_up():
    dataset = open_dataset("synthetic", count=40, size=120)
    seen = {object.category for number in range(40) for object in dataset.objects(number)}
    assert {dataset.categories[category] for category in seen} == set(SHAPES)


@pytest.mark.parametrize("number", range(3))
def test_a_full_size_scene_has_its_five_to_twelve_objects(number):
    assert 5 <= len(open_dataset("synthetic", count=3).objects(number)) <= 12
