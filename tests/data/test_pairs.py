from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam_cache.data import Pair, decode, open_dataset, parse_pair, rle_to_mask
from sam_cache.errors import DatasetError, ImageError, UsageError

SHAPE = (20, 30)


def write(file, values):
    file.parent.mkdir(parents=True, exist_ok=True)
    picture = values if isinstance(values, Image.Image) else Image.fromarray(values)
    picture.save(file)


def write_image(file, shape=SHAPE):
    write(file, np.full((*shape, 3), 77, np.uint8))


def square(value=255, top=2):
    mask = np.zeros(SHAPE, np.uint8)
    mask[top : top + 6, 4:9] = value
    return mask


def make_set(folder, count=3, value=255, same=False):
    """A set of `count` pairs, in one folder or in `im` and `gt`; returns it as a Pair called after the folder."""
    images, masks = (folder, folder) if same else (folder / "im", folder / "gt")
    for number in range(count):
        write_image(images / f"{number:03}.jpg")
        write(masks / f"{number:03}.png", square(value, top=number % 10))
    return Pair(folder.name, images, masks)


def open_pairs(*pairs, **more):
    return open_dataset("pairs", pairs=pairs, **more)


def masks_of(dataset, number):
    record = dataset.images[number]
    return [rle_to_mask(found.rle, record.height, record.width) for found in dataset.objects(number)]


def test_sets_keep_their_names_and_files_and_take_turns(tmp_path):
    first, second = make_set(tmp_path / "B"), make_set(tmp_path / "A", count=2)
    dataset = open_pairs(first, Pair("A.val", second.images, second.masks, "val"))
    assert [(record.split, record.path) for record in dataset.images] == [
        ("train/B", "000.jpg"), ("val/A.val", "000.jpg"),
        ("train/B", "001.jpg"), ("val/A.val", "001.jpg"),
        ("train/B", "002.jpg"),
    ]  # fmt: skip
    assert len({record.id for record in dataset.images}) == 5
    assert dataset.categories == {1: "foreground"}
    assert dataset.notes == [
        "train/B: 3 images (looked at 3 of 3 masks)",
        "val/A.val: 2 images (looked at 2 of 2 masks)",
    ]
    for number, record in enumerate(dataset.images):
        (found,) = dataset.objects(number)
        assert (found.category, found.id, (record.height, record.width)) == (1, record.id, SHAPE)
        np.testing.assert_array_equal(masks_of(dataset, number)[0], square(1, top=int(record.path[:3])))
    assert dataset.problems == []


def test_an_image_of_the_same_path_is_read_in_its_own_set(tmp_path):
    first, second = make_set(tmp_path / "a"), make_set(tmp_path / "b")
    write(second.images / "000.jpg", np.zeros((*SHAPE, 3), np.uint8))
    dataset = open_pairs(first, second)
    light, dark = (decode(dataset.read(dataset.images[number]), dataset.images[number]).image for number in (0, 1))
    assert light.mean() > 70
    assert dark.mean() == 0


def test_ids_stay_when_sets_and_files_are_added(tmp_path):
    pair = make_set(tmp_path / "a")
    before = open_pairs(pair)
    write_image(pair.images / "0.jpg")
    write(pair.masks / "0.png", square())
    after = open_pairs(make_set(tmp_path / "b"), pair)
    known = {record.path: record for record in after.images if record.split == "train/a"}
    assert [known[record.path] for record in before.images] == list(before.images)
    number = after.images.index(before.images[0])
    assert after.objects(number)[0].id == before.objects(0)[0].id


def test_image_and_mask_of_one_name_in_one_folder(tmp_path):
    pair = make_set(tmp_path / "both", same=True)
    (pair.images / "000.jpg").rename(pair.images / "000.JPEG")
    dataset = open_pairs(pair)
    assert [record.path for record in dataset.images] == ["000.JPEG", "001.jpg", "002.jpg"]
    assert len(masks_of(dataset, 0)) == 1
    assert len(dataset.notes) == 1


def test_files_that_could_be_each_others_mask_are_named_and_left_out(tmp_path):
    pair = make_set(tmp_path / "both", same=True)
    write(pair.images / "x.png", square())
    write(pair.images / "x.tif", square())
    dataset = open_pairs(pair)
    assert len(dataset.images) == 3
    assert "2 files that could be each other's mask" in dataset.notes[1]
    assert "x.png, x.tif" in dataset.notes[1]


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P"])
def test_an_object_is_what_lies_above_half_in_grey_of_any_kind(tmp_path, mode):
    pair = make_set(tmp_path / "a")
    values = square(255)
    values[0, :4] = (1, 126, 127, 128)  # an anti-aliased edge
    grey = Image.fromarray(values)
    if mode == "P":  # entry n shows grey 255 - n
        picture = Image.fromarray(255 - values).convert("P")
        picture.putpalette([255 - entry for entry in range(256) for _ in range(3)])
    else:
        picture = grey.convert(mode)
    write(pair.masks / "001.png", picture)
    np.testing.assert_array_equal(masks_of(open_pairs(pair), 1)[0], values > 127)


@pytest.mark.parametrize("maximum", [1, 255])
def test_one_bit_masks_fit_either_maximum(tmp_path, maximum):
    pair = make_set(tmp_path / "a", value=maximum)
    write(pair.masks / "001.png", Image.fromarray(square()).convert("1"))
    dataset = open_pairs(pair, mask_maximum=maximum)
    np.testing.assert_array_equal(masks_of(dataset, 1)[0], square(1))
    np.testing.assert_array_equal(masks_of(dataset, 2)[0], square(1, top=2))


def test_masks_of_0_and_1_where_255_is_meant_are_an_error_that_names_both_remedies(tmp_path):
    good, bad = make_set(tmp_path / "good"), make_set(tmp_path / "bad", count=70, value=1)
    write(bad.masks / "001.png", square(0))
    with pytest.raises(
        DatasetError, match=r"bad/gt: masks such as 000\.png have the values 0 and 1.*--mask-maximum 1.*255"
    ):
        open_pairs(good, bad)
    dataset = open_pairs(bad, mask_maximum=1)
    np.testing.assert_array_equal(masks_of(dataset, 0)[0], square(1, top=0))


def test_masks_up_to_255_where_1_is_said_are_an_error(tmp_path):
    with pytest.raises(
        DatasetError, match=r"a/gt: masks such as 000\.png have values up to 255.*leave out --mask-maximum"
    ):
        open_pairs(make_set(tmp_path / "a"), mask_maximum=1)


def test_one_mask_of_another_maximum_is_reported_and_the_others_are_kept(tmp_path):
    pair, ones = make_set(tmp_path / "a"), make_set(tmp_path / "ones", value=1)
    write(pair.masks / "001.png", square(1))
    write(ones.masks / "001.png", square(255))
    dataset = open_pairs(pair)
    assert [len(dataset.objects(number)) for number in range(3)] == [1, 0, 1]
    assert len(dataset.problems) == 1
    assert dataset.problems[0].startswith(
        "mask a/001.png: values 0 and 1 where 0 and 255 are meant; multiply it by 255"
    )
    assert "--mask-maximum 1" in dataset.problems[0]
    dataset = open_pairs(ones, mask_maximum=1)
    assert [len(dataset.objects(number)) for number in range(3)] == [1, 0, 1]
    assert "values up to 255 where --mask-maximum is 1" in dataset.problems[0]


@pytest.mark.parametrize("value", [0, 5, 127])
def test_a_set_without_any_object_is_an_error_that_names_its_folder(tmp_path, value):
    with pytest.raises(
        DatasetError, match=rf"empty/gt: none of its 70 masks has an object, the highest value is {value};"
    ):
        open_pairs(make_set(tmp_path / "a"), make_set(tmp_path / "empty", count=70, value=value))


def test_the_masks_beyond_the_sample_are_looked_at_before_a_set_counts_as_empty(tmp_path):
    pair = make_set(tmp_path / "a", count=70, value=0)
    sampled = set(np.linspace(0, 69, 64).astype(int).tolist())
    hidden = min(set(range(70)) - sampled)
    write(pair.masks / f"{hidden:03}.png", square())
    dataset = open_pairs(pair)
    assert [number for number in range(70) if dataset.objects(number)] == [hidden]


def test_a_folder_of_empty_masks_is_an_error_for_plain_mask_folders_too(tmp_path):
    empty = make_set(tmp_path / "empty", value=0)
    for more in ({}, {"ignore_values": [0]}):
        with pytest.raises(DatasetError, match=r"empty/gt: none of its 3 masks has an object"):
            open_dataset("masks", images=empty.images, masks=empty.masks, **more)
    void = make_set(tmp_path / "void", value=255)
    with pytest.raises(DatasetError, match=r"void/gt: none of its 3 masks has an object"):
        open_dataset("masks", images=void.images, masks=void.masks, classes=[1, 2])


def test_a_mask_folder_is_recognised_by_the_first_mask_that_is_not_empty(tmp_path):
    pair = make_set(tmp_path / "a", count=70, value=0)
    sampled = set(np.linspace(0, 69, 64).astype(int).tolist())
    hidden = min(set(range(70)) - sampled)
    write(pair.masks / f"{hidden:03}.png", square(255))
    dataset = open_dataset("masks", images=pair.images, masks=pair.masks)
    assert dataset.notes[0].startswith("masks are binary 0/255")
    assert len(dataset.objects(hidden)) == 1


def test_bad_files_are_reported_and_never_fatal(tmp_path):
    pair = make_set(tmp_path / "a", count=8)
    write(pair.masks / "001.png", np.dstack([square(), square(9), square()]))
    (pair.masks / "002.png").write_bytes((pair.masks / "000.png").read_bytes()[:-30])
    (pair.masks / "003.png").write_bytes(b"")
    write(pair.masks / "004.png", square().astype(np.uint16) * 257)
    write(pair.masks / "005.png", square(0))
    write(tmp_path / "elsewhere.png", square())
    (pair.masks / "006.png").unlink()
    (pair.masks / "006.png").symlink_to(tmp_path / "elsewhere.png")
    write_image(pair.images / "007.jpg", shape=(9, 9))
    dataset = open_pairs(pair)
    assert [len(dataset.objects(number)) for number in range(8)] == [1, 0, 0, 0, 0, 0, 0, 1]
    said = dict(problem.split(": ", 1) for problem in dataset.problems)
    assert list(said) == [f"mask a/00{number}.png" for number in range(1, 7)]
    wanted = (
        "colour picture; save masks as 8-bit grey",
        "damaged",
        "damaged",
        "holds uint16",
        "is empty",
        "leads outside",
    )
    for problem, words in zip(said.values(), wanted, strict=True):
        assert words in problem
    with pytest.raises(ImageError, match="size 9x9 differs"):
        decode(dataset.read(dataset.images[7]), dataset.images[7])


def test_all_masks_unreadable_is_reported_image_by_image(tmp_path):
    pair = make_set(tmp_path / "a")
    for file in pair.masks.iterdir():
        file.write_bytes(b"no mask")
    dataset = open_pairs(pair)
    assert [dataset.objects(number) for number in range(3)] == [[], [], []]
    assert len(dataset.problems) == 3


@pytest.mark.parametrize(
    ("limit", "kept"),
    [(2, (1, 1, 0)), (3, (1, 1, 1)), (5, (2, 2, 1)), (7, (3, 2, 2)), (9, (4, 2, 3)), (99, (5, 2, 3))],
)
def test_a_limit_takes_images_of_the_sets_in_turn(tmp_path, limit, kept):
    dataset = open_pairs(
        *(make_set(tmp_path / name, count) for name, count in (("a", 5), ("b", 2), ("c", 3))), limit=limit
    )
    splits = [record.split for record in dataset.images]
    assert tuple(splits.count(f"train/{name}") for name in "abc") == kept
    assert dataset.notes == [
        f"train/{name}: {count} images (looked at {count} of {count} masks)"
        for name, count in zip("abc", kept, strict=True)
        if count
    ]
    for number, record in enumerate(dataset.images):
        np.testing.assert_array_equal(masks_of(dataset, number)[0], square(1, top=int(record.path[:3])))


def test_a_smaller_limit_is_the_beginning_of_a_larger_one(tmp_path):
    pairs = [make_set(tmp_path / name, count) for name, count in (("a", 2), ("b", 4), ("c", 1))]
    whole = open_pairs(*pairs).images
    assert len(whole) == 7
    for limit in range(1, 8):
        assert open_pairs(*pairs, limit=limit).images == whole[:limit]


def test_a_pattern_names_masks_that_are_called_otherwise(tmp_path):
    for name in "xy":
        write_image(tmp_path / f"{name}_im.png")
        write(tmp_path / f"{name}_im_gt.png", square())
    dataset = open_pairs(Pair("a", tmp_path, tmp_path), mask_pattern="{stem}_gt.png")
    assert [record.path for record in dataset.images] == ["x_im.png", "y_im.png"]
    with pytest.raises(UsageError, match="one mask per image"):
        open_pairs(Pair("a", tmp_path, tmp_path), mask_pattern="{stem}*")


def test_entries_are_read_below_the_root(tmp_path):
    assert parse_pair("A.b_c-1=im:gt", "train", tmp_path) == Pair("A.b_c-1", tmp_path / "im", tmp_path / "gt")
    assert parse_pair(f"A={tmp_path}/im:gt", "val") == Pair("A", tmp_path / "im", Path("gt"), "val")
    assert parse_pair(f"A={tmp_path}/im:gt", "val", tmp_path / "other").images == tmp_path / "im"


@pytest.mark.parametrize(
    "text", ["", "im:gt", "A=", "A=im", "A=im:", "A=:gt", "A=im:gt:more", "=im:gt", "A/b=i:g", "A b=i:g"]
)
def test_malformed_entries_show_what_to_write(text):
    with pytest.raises(UsageError, match=r"^--val-pairs .*(NAME=IMAGES:MASKS|letters, digits)"):
        parse_pair(text, "val")


def test_missing_pairs_names_and_folders(tmp_path):
    pair = make_set(tmp_path / "a")
    with pytest.raises(UsageError, match="--pairs NAME=IMAGES:MASKS, such as"):
        open_pairs()
    with pytest.raises(UsageError, match="a=.*given twice"):
        open_pairs(pair, Pair("a", pair.images, pair.masks, "val"))
    with pytest.raises(DatasetError, match="nowhere: no such folder"):
        open_pairs(Pair("a", pair.images, tmp_path / "nowhere"))
    with pytest.raises(DatasetError, match="none of its 3 images has a mask"):
        open_pairs(Pair("a", pair.images, tmp_path / "a" / "im"))


def test_real_cracks_and_vessels_are_what_a_mask_folder_makes_of_them(real_data):
    cracks = Pair("cracks", real_data / "crackforest/image", real_data / "crackforest/derived/masks_png")
    vessels = Pair("vessels", real_data / "chasedb1", real_data / "chasedb1")
    for pair, pattern in ((cracks, "{stem}.*"), (vessels, "{stem}_1stHO.png")):
        as_pairs = open_pairs(pair, mask_pattern=pattern, limit=4)
        as_masks = open_dataset("masks", images=pair.images, masks=pair.masks, mask_pattern=pattern, limit=4)
        assert [record.path for record in as_pairs.images] == [record.path for record in as_masks.images]
        for number in range(4):
            (mine,), (other,) = as_pairs.objects(number), as_masks.objects(number)
            assert (mine.rle, mine.box_xywh_image, mine.area) == (other.rle, other.box_xywh_image, other.area)
