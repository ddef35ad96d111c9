import colorsys
import itertools

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as transforms

from sam_cache.data import Augmentation, augment, decode, mask_to_rle, measure_rle, open_dataset, parse_augmentation
from sam_cache.data.move import PADDING
from sam_cache.data.rle import rle_to_mask
from sam_cache.errors import UsageError

EVERYTHING = Augmentation(hflip=0.5, vflip=0.5, rotate90=True, jitter=(0.1, 2.0), colour=0.2)

fractions = st.floats(0, 1)
augmentations = st.builds(
    Augmentation,
    hflip=fractions,
    vflip=fractions,
    rotate90=st.booleans(),
    jitter=st.none() | st.tuples(st.floats(1e-3, 9), st.floats(1e-3, 9)).map(lambda pair: tuple(sorted(pair))),
    colour=fractions,
)


def noise(height, width, seed=0):
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (height, width, 3), np.uint8), (random.random((height, width)) < 0.3).astype(
        np.uint8
    )


def disk(height, width, x, y, radius):
    rows, columns = np.mgrid[:height, :width]
    return ((columns + 0.5 - x) ** 2 + (rows + 0.5 - y) ** 2 <= radius**2).astype(np.uint8)


def run(image, masks, seed, augmentation):
    """`augment` on arrays: the new image, the new masks, and which are left."""
    random = np.random.default_rng(seed)
    image, rles, kept = augment(image, [mask_to_rle(mask) for mask in masks], random, augmentation)
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    return image, [rle_to_mask(rle, *image.shape[:2]) for rle in rles], kept


def painted(mask):
    """An image whose object can be told from its ground and from the padding, which look alike."""
    return np.repeat(np.where(mask, 255, PADDING).astype(np.uint8)[:, :, None], 3, axis=2)


def seen(image):
    return (image[:, :, 0] > (255 + PADDING) / 2).astype(np.uint8)


def iou(a, b):
    return (a & b).sum() / max(1, (a | b).sum())


@given(augmentations)
def test_text_and_augmentation_agree(augmentation):
    assert parse_augmentation(str(augmentation)) == augmentation


@pytest.mark.parametrize(
    ("text", "augmentation"),
    [
        ("none", Augmentation()),
        ("hflip,vflip,rotate90,jitter:0.1-2.0,colour:0.2", EVERYTHING),
        ("colour, jitter ,rotate90,vflip,hflip", EVERYTHING),
        ("hflip:0.3", Augmentation(hflip=0.3)),
        ("vflip:1", Augmentation(vflip=1)),
        ("jitter:.5-1", Augmentation(jitter=(0.5, 1))),
        ("hflip:0", Augmentation()),
    ],
)
def test_texts(text, augmentation):
    assert parse_augmentation(text) == augmentation


def test_written_as_people_would():
    assert str(Augmentation()) == "none"
    assert str(EVERYTHING) == "hflip,vflip,rotate90,jitter:0.1-2.0,colour:0.2"
    assert str(Augmentation(hflip=0.3, colour=1)) == "hflip:0.3,colour:1.0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hflip,color:0.2", "'color:0.2': unknown; did you mean colour"),
        ("rotate", "'rotate': unknown; did you mean rotate90"),
        ("non", "did you mean none"),
        ("", "'': unknown"),
        ("hflip,,vflip", "'': unknown"),
        ("hflip,none", "none stands alone"),
        ("hflip,hflip:0.2", "'hflip:0.2': hflip is given twice"),
        ("rotate90:0.5", "'rotate90:0.5': takes no number; write rotate90"),
        ("hflip:half", "'hflip:half': not a number.*hflip:0.3"),
        ("hflip:", "'hflip:': not a number"),
        ("colour:nan", "not a number"),
        ("jitter:2", "'jitter:2': not a number.*jitter:0.1-2.0"),
        ("jitter:2-0.1", "jitter:2.0-0.1: give the lower scale first"),
        ("jitter:0-1", "both above 0"),
        ("jitter:1-1e999", "jitter:1.0-inf"),
        ("hflip:1.5", "hflip:1.5: must be from 0 to 1"),
        ("colour:2", "colour:2.0: must be from 0 to 1"),
    ],
)
def test_texts_that_mean_nothing(text, message):
    with pytest.raises(UsageError, match=message):
        parse_augmentation(text)


def test_no_number_slips_in_from_python():
    for wrong in ({"hflip": float("nan")}, {"vflip": -0.1}, {"jitter": (float("nan"), 1)}):
        with pytest.raises(UsageError, match=f"augmentation {next(iter(wrong))}:"):
            Augmentation(**wrong)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 99), st.booleans(), st.booleans(), st.booleans())
def test_flips_and_quarter_turns_are_numpys(height, width, seed, hflip, vflip, rotate90):
    image, mask = noise(height, width, seed)
    masks = [part for part in (mask, 1 - mask) if part.any()]
    augmentation = Augmentation(hflip=float(hflip), vflip=float(vflip), rotate90=rotate90)
    new_image, new_masks, kept = run(image, masks, seed, augmentation)

    def oracle(array, quarters):
        array = array[:, ::-1] if hflip else array
        array = array[::-1] if vflip else array
        return np.rot90(array, quarters)

    turns = [q for q in range(4 if rotate90 else 1) if np.array_equal(new_image, oracle(image, q))]
    assert turns
    assert kept == list(range(len(masks)))
    assert any(all(map(np.array_equal, new_masks, [oracle(part, q) for part in masks])) for q in turns)


def test_flips_come_as_often_as_asked_and_turns_equally_often():
    image, mask = noise(6, 6)
    flipped, turned = 0, np.zeros(4, int)
    for seed in range(400):
        new_image, _, _ = run(image, [mask], seed, Augmentation(hflip=0.3))
        flipped += np.array_equal(new_image, image[:, ::-1])
        new_image, _, _ = run(image, [mask], seed, Augmentation(rotate90=True))
        turned += [np.array_equal(new_image, np.rot90(image, quarters)) for quarters in range(4)]
    assert 90 < flipped < 150
    assert turned.sum() == 400
    assert turned.min() > 70


@settings(max_examples=150)
@given(
    st.integers(20, 90),
    st.integers(20, 90),
    st.integers(0, 2**32 - 1),
    st.tuples(fractions, fractions, st.floats(2, 25)),
    st.floats(0.1, 3),
)
def test_image_and_mask_stay_on_each_other(height, width, seed, where, scale):
    mask = disk(height, width, where[0] * width, where[1] * height, where[2])
    augmentation = Augmentation(hflip=0.5, vflip=0.5, rotate90=True, jitter=(scale, scale))
    image, masks, _ = run(painted(mask), [mask], seed, augmentation)
    found = masks[0] if masks else np.zeros(image.shape[:2], np.uint8)
    kernel = np.ones((3, 3), np.uint8)
    surely, perhaps = cv2.erode(found, kernel), cv2.dilate(found, kernel)
    if not masks:
        assert seen(image).sum() <= 4  # what little is left lies between the middles of the new pixels
        return
    assert (surely <= seen(image)).all()
    assert (seen(image) <= perhaps).all()
    if found.sum() > 400:
        assert iou(found, seen(image)) > 0.9


def test_shrunken_masks_are_not_shifted():
    mask = disk(200, 260, 130, 100, 70)
    shifts = []
    for seed in range(40):
        image, (found,), _ = run(painted(mask), [mask], seed, Augmentation(jitter=(0.1, 0.6)))
        weights = image[:, :, 0].astype(float) - PADDING
        rows, columns = np.mgrid[: image.shape[0], : image.shape[1]]
        shifts.append([(at * weights).sum() / weights.sum() - at[found > 0].mean() for at in (rows, columns)])
    assert np.abs(np.mean(shifts, axis=0)).max() < 0.05


@pytest.mark.parametrize(("height", "width", "scale"), [(40, 60, 0.5), (41, 33, 0.3), (10, 90, 0.1), (5, 7, 0.01)])
def test_a_smaller_image_lies_at_the_upper_left(height, width, scale):
    image, _ = noise(height, width)
    new, (whole,), _ = run(image, [np.ones((height, width), np.uint8)], 1, Augmentation(jitter=(scale, scale)))
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    assert new.shape == image.shape
    shrunken = transforms.resize(torch.from_numpy(image).permute(2, 0, 1), [rows, columns], antialias=True)
    np.testing.assert_array_equal(new[:rows, :columns], shrunken.permute(1, 2, 0).numpy())
    expected = np.zeros((height, width), np.uint8)
    expected[:rows, :columns] = 1
    np.testing.assert_array_equal(whole, expected)
    assert (new[expected == 0] == PADDING).all()


def test_a_larger_image_is_cropped_anywhere():
    ramp = np.stack(np.broadcast_arrays(np.arange(80)[:, None], np.arange(100)[None] * 2, 7), axis=2).astype(np.uint8)
    corners = set()
    for seed in range(300):
        new, (whole,), _ = run(ramp, [np.ones((80, 100), np.uint8)], seed, Augmentation(jitter=(4, 4)))
        assert new.shape == ramp.shape
        assert whole.all()
        corners.add((int(new[0, 0, 0]), int(new[0, 0, 1]) // 2))
        middle = new[4:-4, 4:-4].astype(float)
        assert np.abs(np.diff(middle[:, 0, 0])).mean() == pytest.approx(1 / 4, abs=0.02)
        assert np.abs(np.diff(middle[0, :, 1])).mean() == pytest.approx(2 / 4, abs=0.02)
    tops, lefts = map(set, zip(*corners, strict=True))
    assert (min(tops), max(tops)) == (0, 60)
    assert (min(lefts), max(lefts)) == (0, 75)
    assert len(tops) > 50
    assert len(lefts) > 60


def test_a_turned_image_is_scaled_on_its_turned_canvas():
    image, _ = noise(40, 60)
    shapes = set()
    for seed in range(20):
        turned = run(image, [], seed, Augmentation(rotate90=True))[0]
        for scale in (0.5, 2):
            both = Augmentation(rotate90=True, jitter=(scale, scale))
            new, (whole,), _ = run(image, [np.ones((40, 60), np.uint8)], seed, both)
            assert new.shape == turned.shape
            assert whole.sum() == 40 * 60 * min(1, scale**2)
        shapes.add(turned.shape)
    assert shapes == {(40, 60, 3), (60, 40, 3)}


def test_scales_are_drawn_evenly_from_the_range():
    mask = np.ones((1000, 1), np.uint8)
    image = painted(mask)
    scales = [run(image, [mask], seed, Augmentation(jitter=(0.2, 0.8)))[1][0].sum() / 1000 for seed in range(200)]
    counts, _ = np.histogram(scales, bins=4, range=(0.2, 0.8))
    assert counts.sum() == 200
    assert counts.min() > 30


@given(st.integers(0, 2**32 - 1))
def test_nothing_happens_unless_asked_for(seed):
    image, mask = noise(9, 13, seed)
    rles = [mask_to_rle(mask), mask_to_rle(1 - mask)]
    for augmentation in (Augmentation(), Augmentation(jitter=(1, 1)), Augmentation(hflip=1e-300)):
        new_image, new_rles, kept = augment(image, rles, np.random.default_rng(seed), augmentation)
        np.testing.assert_array_equal(new_image, image)
        assert new_rles == rles
        assert kept == [0, 1]


def test_vanished_objects_are_dropped_and_the_others_named():
    masks = [np.zeros((50, 70), np.uint8) for _ in range(4)]
    masks[0][3, 3] = 1  # between the middles of the new pixels, which lie 10 apart
    masks[1][10:30, 10:40] = 1
    masks[2][49, 69] = 1
    masks[3][40:, 50:] = 1
    _, left, kept = run(painted(masks[1]), masks, 0, Augmentation(jitter=(0.1, 0.1)))
    assert kept == [1, 3]
    assert [mask.sum() for mask in left] == [6, 2]

    cropped = [run(painted(masks[1]), masks, seed, Augmentation(jitter=(4, 4)))[2] for seed in range(40)]
    assert len({tuple(kept) for kept in cropped}) >= 3
    assert [] in cropped

    image, left, kept = run(painted(masks[1]), [], 0, EVERYTHING)
    assert (left, kept) == ([], [])


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), augmentations)
def test_the_same_chance_gives_the_same_result(seed, augmentation):
    image, mask = noise(24, 31, seed)
    before = image.copy()
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = run(image, [mask, 1 - mask], seed, augmentation)
    again = run(image, [mask, 1 - mask], seed, augmentation)
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert first[2] == again[2]
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)
    np.testing.assert_array_equal(image, before)


@given(st.integers(0, 2**32 - 1), augmentations)
def test_as_much_chance_is_taken_whatever_is_asked_for(seed, augmentation):
    image, mask = noise(8, 11)
    taken, expected = np.random.default_rng(seed), np.random.default_rng(seed)
    augment(image, [mask_to_rle(mask)] * 3, taken, augmentation)
    augment(image, [], expected, Augmentation())
    assert taken.bit_generator.state == expected.bit_generator.state


def test_parts_do_not_disturb_each_other():
    image, mask = noise(20, 20)
    for seed in range(30):
        alone = run(image, [mask], seed, Augmentation(hflip=0.5, rotate90=True))[1]
        coloured = run(image, [mask], seed, Augmentation(hflip=0.5, vflip=0, rotate90=True, colour=0.5))[1]
        np.testing.assert_array_equal(alone, coloured)


def test_colour_changes_the_image_and_not_the_masks():
    image, mask = noise(30, 40)
    new_image, (new_mask,), _ = run(image, [mask], 3, Augmentation(colour=0.2))
    assert (new_image != image).mean() > 0.5
    np.testing.assert_array_equal(new_mask, mask)


def test_brightness_and_hue_stay_within_their_strength():
    grey = np.full((4, 4, 3), 100, np.uint8)
    green = np.broadcast_to(np.array([80, 150, 100], np.uint8), (4, 4, 3))
    levels, hues = [], []
    for seed in range(300):
        image, _, _ = run(grey, [], seed, Augmentation(colour=0.2))  # one grey has no contrast, saturation or hue
        assert (image == image[0, 0, 0]).all()
        levels.append(int(image[0, 0, 0]))
        image, _, _ = run(green, [], seed, Augmentation(colour=0.2))
        hues.append(colorsys.rgb_to_hsv(*image[0, 0] / 255)[0])
    assert (min(levels), max(levels)) == (pytest.approx(80, abs=2), pytest.approx(120, abs=2))
    middle = colorsys.rgb_to_hsv(80 / 255, 150 / 255, 100 / 255)[0]
    assert (min(hues), max(hues)) == (pytest.approx(middle - 0.05, abs=0.01), pytest.approx(middle + 0.05, abs=0.01))


def test_padding_keeps_its_grey_under_colour():
    image, mask = noise(30, 40)
    for seed in range(10):
        new, _, _ = run(image, [mask], seed, Augmentation(jitter=(0.5, 0.5), colour=1))
        assert (new[15:] == PADDING).all()
        assert (new[:, 20:] == PADDING).all()


def test_images_of_a_few_pixels_survive_everything():
    for height, width, seed in itertools.product(range(1, 6), range(1, 6), range(12)):
        image, mask = noise(height, width, seed)
        mask[seed % height, seed % width] = 1
        new_image, new_masks, _ = run(image, [mask, np.ones_like(mask)], seed, EVERYTHING)
        assert sorted(new_image.shape[:2]) == sorted((height, width))
        assert all(mask.any() for mask in new_masks)
        run(image, [mask], seed, Augmentation(jitter=(0.001, 0.001), colour=1))


def test_read_only_and_mirrored_images_are_taken():
    image, mask = noise(12, 17)
    expected = run(np.ascontiguousarray(image[::-1]), [mask], 5, EVERYTHING)[0]
    image.flags.writeable = False
    np.testing.assert_array_equal(run(image[::-1], [mask], 5, EVERYTHING)[0], expected)


def test_real_nuclei_stay_apart_and_measurable(real_data):
    root = real_data / "nuclei_dsb2018/stage1_train"
    dataset = open_dataset("masks", images=root, masks=root, mask_pattern="{dir}/../masks/*", limit=3)
    for number, record in enumerate(dataset.images):
        image, objects = decode(dataset.read(record), record).image, dataset.objects(number)
        for seed in range(5):
            new, rles, kept = augment(image, [o.rle for o in objects], np.random.default_rng(seed), EVERYTHING)
            assert len(rles) == len(kept)
            assert kept == sorted(set(kept))
            assert set(kept) <= set(range(len(objects)))
            height, width = new.shape[:2]
            assert sum(rle_to_mask(rle, height, width).astype(int) for rle in rles).max() == 1
            for rle in rles:
                (x, y, w, h), area = measure_rle(rle, height, width)
                assert 0 < area <= w * h
                assert 0 <= x < x + w <= width
                assert 0 <= y < y + h <= height
