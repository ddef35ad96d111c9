import json

import numpy as np
import pytest
from PIL import Image

from sam_cache.data import decode, open_dataset, rle_to_mask
from sam_cache.data.pairing import pair_masks
from sam_cache.errors import DatasetError, ImageError, UsageError

SHAPE = (20, 30)


def write_image(file, shape=SHAPE):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", shape[::-1], (200, 100, 50)).save(file)


def write_mask(file, values, mode=None):
    file.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(np.asarray(values))
    picture = picture.convert("1") if mode == "1" else picture
    if mode == "P":
        picture.putpalette([value for entry in range(256) for value in (entry, 255 - entry, 7 * entry % 256)])
    picture.save(file)


def square(value=1, top=2, shape=SHAPE):
    mask = np.zeros(shape, np.uint8)
    mask[top : top + 6, 4:9] = value
    return mask


def masks_of(dataset, number):
    record = dataset.images[number]
    return [(o.category, rle_to_mask(o.rle, record.height, record.width)) for o in dataset.objects(number)]


def open_folders(root, **more):
    return open_dataset("masks", root=root, **more)


@pytest.mark.parametrize(("values", "mode"), [(1, None), (255, None), (255, "1"), (1, "P")])
def test_binary_masks_are_recognised(tmp_path, values, mode):
    for name in ("b", "a", "empty"):
        write_image(tmp_path / "images" / f"{name}.jpg")
        write_mask(tmp_path / "masks" / f"{name}.png", square(values) * (name != "empty"), mode)
    dataset = open_folders(tmp_path)
    assert [record.path for record in dataset.images] == ["a.jpg", "b.jpg", "empty.jpg"]
    assert [(record.height, record.width) for record in dataset.images] == [SHAPE] * 3
    shown = 1 if mode == "1" else values  # a 1-bit picture has the values 0 and 1
    assert dataset.notes == [f"masks are binary 0/{shown} (looked at 3 of 3)"]
    assert dataset.categories == {1: "object"}
    ((category, mask),) = masks_of(dataset, 0)
    assert category == 1
    np.testing.assert_array_equal(mask, square())
    assert dataset.objects(0)[0].box_xywh_image == (4, 2, 5, 6)
    assert dataset.objects(2) == []
    assert dataset.problems == ["mask empty.png: is empty"]


def test_binary_in_three_equal_channels(tmp_path):
    write_image(tmp_path / "images/a.jpg")
    write_mask(tmp_path / "masks/a.png", np.dstack([square(255)] * 3))
    ((_, mask),) = masks_of(open_folders(tmp_path), 0)
    np.testing.assert_array_equal(mask, square())


@pytest.mark.parametrize("mode", [None, "P"])
def test_class_indices(tmp_path, mode):
    write_image(tmp_path / "images/a.jpg")
    values = square(2) + square(7, top=11)
    values[0] = 255
    write_mask(tmp_path / "masks/a.png", values, mode)
    dataset = open_folders(tmp_path)
    assert dataset.notes == ["masks are class indices (looked at 1 of 1, values 0, 2, 7, 255)"]
    found = masks_of(dataset, 0)
    assert [category for category, _ in found] == [2, 7]
    np.testing.assert_array_equal(found[0][1], square())
    np.testing.assert_array_equal(found[1][1], square(top=11))
    assert dataset.categories == {2: "2", 7: "7"}


def test_sixteen_bit_indices(tmp_path):
    write_image(tmp_path / "images/a.jpg")
    write_mask(tmp_path / "masks/a.png", square().astype(np.uint16) * 4000)
    assert [category for category, _ in masks_of(open_folders(tmp_path), 0)] == [4000]


def test_ignore_values_make_binary_looking_masks_indices(tmp_path):
    write_image(tmp_path / "images/a.jpg")
    write_mask(tmp_path / "masks/a.png", square())
    found = masks_of(open_folders(tmp_path, ignore_values=[255]), 0)
    assert [category for category, _ in found] == [0, 1]
    np.testing.assert_array_equal(found[0][1], 1 - square())


def test_one_object_per_component(tmp_path):
    write_image(tmp_path / "images/a.jpg")
    values = square(3) + square(3, top=11)
    values[8, 9] = 3  # touches the first square by a corner
    write_mask(tmp_path / "masks/a.png", values)
    assert len(open_folders(tmp_path).objects(0)) == 1
    dataset = open_folders(tmp_path, objects_per="component")
    objects = dataset.objects(0)
    assert [object.area for object in objects] == [31, 30]
    assert len({object.id for object in objects}) == 2
    assert sum(mask for _, mask in masks_of(dataset, 0)).tolist() == (values == 3).astype(int).tolist()


def test_masks_that_disagree_with_the_others(tmp_path):
    for number in range(70):  # more than the sample: not all are looked at
        write_image(tmp_path / "images" / f"{number:02}.png")
        write_mask(tmp_path / "masks" / f"{number:02}.png", square(255 if number != 11 else 9))
    dataset = open_folders(tmp_path)
    assert dataset.notes == ["masks are binary 0/255 (looked at 64 of 70)"]
    assert dataset.objects(11) == []
    assert dataset.problems[0].startswith("mask 11.png: values 0, 9, where other masks have only 0 and 255")


def test_mask_saved_as_jpeg(tmp_path):
    write_image(tmp_path / "images/a.png")
    write_mask(tmp_path / "masks/a.jpg", square(255))
    with pytest.raises(DatasetError, match=r"a\.jpg: grey levels near 0 and 255.*threshold"):
        open_folders(tmp_path)


def test_colour_masks_and_damage_are_reported(tmp_path):
    for name in "abcd":
        write_image(tmp_path / "images" / f"{name}.png")
        write_mask(tmp_path / "masks" / f"{name}.png", square())
    write_mask(tmp_path / "masks/b.png", np.dstack([square(), square(5), square()]))
    (tmp_path / "masks/c.png").write_bytes((tmp_path / "masks/a.png").read_bytes()[:-30])
    (tmp_path / "masks/d.png").write_bytes(b"")
    dataset = open_folders(tmp_path)
    assert [len(dataset.objects(number)) for number in range(4)] == [1, 0, 0, 0]
    assert [problem.partition(":")[0] for problem in dataset.problems] == ["mask b.png", "mask c.png", "mask d.png"]
    assert "colour picture" in dataset.problems[0]
    assert "damaged" in dataset.problems[1]
    assert (dataset.images[3].height, dataset.images[3].width) == (0, 0)


def test_unpaired_files_are_listed(tmp_path):
    for name in ("a", "b", "c"):
        write_image(tmp_path / "images" / f"{name}.jpg")
    for name in ("b", "d"):
        write_mask(tmp_path / "masks" / f"{name}.png", square())
    (tmp_path / "masks/notes.txt").write_text("no mask")
    dataset = open_folders(tmp_path)
    assert [record.path for record in dataset.images] == ["b.jpg"]
    assert dataset.notes[1:] == [
        "2 images without a mask, left out: a.jpg, c.jpg",
        "1 masks without an image, left out: d.png",
    ]


def test_ids_stay_when_files_are_added(tmp_path):
    write_image(tmp_path / "images/b.jpg")
    write_mask(tmp_path / "masks/b.png", square())
    before = open_folders(tmp_path).images[0]
    write_image(tmp_path / "images/a.jpg")
    write_mask(tmp_path / "masks/a.png", square())
    dataset = open_folders(tmp_path)
    assert dataset.images[1] == before
    assert dataset.images[0].id != before.id


def test_limit(tmp_path):
    for name in "abc":
        write_image(tmp_path / "images" / f"{name}.jpg")
        write_mask(tmp_path / "masks" / f"{name}.png", square())
    assert [record.path for record in open_folders(tmp_path, limit=2).images] == ["a.jpg", "b.jpg"]


def test_links_out_of_the_folder_are_refused(tmp_path):
    write_image(tmp_path / "elsewhere.png")
    write_mask(tmp_path / "mask.png", square())
    for folder, target in (("images", "elsewhere.png"), ("masks", "mask.png")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").symlink_to(tmp_path / target)
    dataset = open_folders(tmp_path)
    with pytest.raises(ImageError, match="leads outside"):
        dataset.read(dataset.images[0])
    assert dataset.objects(0) == []
    assert "leads outside" in dataset.problems[0]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("{stem}.*", ["x/a.png"]),
        ("./{stem}.*", ["a.png"]),
        ("{stem}_m.png", ["x/a_m.png"]),
        ("{dir}/{stem}_m.png", ["x/a_m.png"]),
        ("{dir}/../y/*.png", ["y/1.png", "y/2.png"]),
        ("{stem}/*", ["a/1.b.png", "a/2.png"]),
        ("{stem}/*.b.*", ["a/1.b.png"]),
        ("../../{stem}.png", []),
        ("{stem}*", ["x/a.b.png", "x/a.png", "x/a_m.png", "x/ab.png"]),
    ],
)
def test_patterns(pattern, found):
    masks = ["a.png", "a/1.b.png", "a/2.png", "x/a.b.png", "x/a.png", "x/a_m.png", "x/ab.png"]
    masks += ["y/1.png", "y/2.png", "y/z/3.png"]
    assert pair_masks(["x/a.jpg"], masks, pattern) == [found]


@pytest.mark.parametrize("pattern", ["{name}.png", "*/{stem}.png", "{stem}/", ""])
def test_bad_patterns(pattern):
    with pytest.raises(DatasetError, match="mask pattern"):
        pair_masks([], [], pattern)


def test_no_pairs_or_folders(tmp_path):
    write_image(tmp_path / "images/a.jpg")
    with pytest.raises(DatasetError, match="masks: no such folder"):
        open_folders(tmp_path)
    (tmp_path / "masks").mkdir()
    with pytest.raises(DatasetError, match="none of its 1 images has a mask called"):
        open_folders(tmp_path)
    with pytest.raises(DatasetError, match="no images or masks given"):
        open_dataset("masks", images=tmp_path)


def test_real_nuclei_one_file_per_object(real_data):
    root = real_data / "nuclei_dsb2018/stage1_train"
    dataset = open_dataset("masks", images=root, masks=root, mask_pattern="{dir}/../masks/*", limit=4)
    by_stem = open_dataset("masks", images=root, masks=root, mask_pattern="{stem}/masks/*.png", limit=4)
    assert dataset.notes[0] == by_stem.notes[0]
    assert dataset.notes[0].startswith("masks are binary 0/255 (looked at 64 of ")
    assert len(dataset.notes) == 1
    assert dataset.images == by_stem.images
    file = json.loads((real_data / "nuclei_dsb2018/derived/instances_rle.json").read_text())
    expected = {}
    names = {image["id"]: image["file_name"].removeprefix("stage1_train/") for image in file["images"]}
    for annotation in file["annotations"]:
        expected.setdefault(names[annotation["image_id"]], set()).add(annotation["segmentation"]["counts"].encode())
    for number, record in enumerate(dataset.images):
        assert {object.rle for object in dataset.objects(number)} == expected[record.path]
        assert decode(dataset.read(record), record).image.shape == (record.height, record.width, 3)
    assert dataset.problems == []


def test_real_vessels_in_one_folder(real_data):
    root = real_data / "chasedb1"
    dataset = open_dataset("masks", images=root, masks=root, mask_pattern="{stem}_1stHO.png", limit=2)
    assert [record.path for record in dataset.images] == ["Image_01L.jpg", "Image_01R.jpg"]
    assert dataset.notes[0] == "masks are binary 0/1 (looked at 2 of 2)"
    assert dataset.notes[1].startswith("20 images without a mask, left out: Image_01L_2ndHO.png, ")
    with Image.open(root / "Image_01L_1stHO.png") as mask:
        np.testing.assert_array_equal(masks_of(dataset, 0)[0][1], np.asarray(mask))


def test_real_cracks(real_data):
    root = real_data / "crackforest"
    dataset = open_dataset("masks", images=root / "image", masks=root / "derived/masks_png")
    assert len(dataset.images) == 80
    assert dataset.notes == ["masks are binary 0/255 (looked at 64 of 80)"]
    objects = [object for number in range(0, 80, 8) for object in dataset.objects(number)]
    assert len(objects) == 10
    assert all(0.003 < object.area / (480 * 320) < 0.07 for object in objects)


def test_real_street_scenes_where_every_value_is_a_class(real_data):
    root = real_data / "camvid"
    folders = {"images": root / "train", "masks": root / "trainannot"}
    dataset = open_dataset("masks", **folders, ignore_values=[11], limit=2)
    with Image.open(folders["masks"] / dataset.images[0].path) as mask:
        values = np.asarray(mask)
    found = masks_of(dataset, 0)
    assert [category for category, _ in found] == sorted(set(np.unique(values)) - {11})
    assert sum(mask.sum() for _, mask in found) == (values != 11).sum()
    assert 0 in dict(found)


def test_real_palette_with_a_real_size_mismatch(real_data):
    root = real_data / "davis_frames"
    dataset = open_folders(root)
    assert [record.path for record in dataset.images][:2] == ["bike/00000.jpg", "judo/00000.jpg"]
    assert [len(dataset.objects(number)) for number in range(5)] == [2, 1, 1, 1, 1]
    assert sorted(dataset.categories) == [1, 2, 3, 4]
    sizes = []
    for record in dataset.images:
        try:
            sizes.append(decode(dataset.read(record), record).image.shape[1])
        except ImageError as error:
            sizes.append(str(error))
    assert sizes[2].startswith("judo/00005.jpg: size 854x480 differs from 853x480")
    assert sizes[:2] + sizes[3:] == [854] * 4


def test_real_palette_with_void(real_data):
    root = real_data / "labelme_voc/data_dataset_voc"
    folders = {"images": root / "JPEGImages", "masks": root / "SegmentationClass"}
    dataset = open_dataset("masks", **folders, mask_pattern="{stem}.png")
    for number, record in enumerate(dataset.images):
        with Image.open(folders["masks"] / record.path.replace(".jpg", ".png")) as mask:
            values = np.asarray(mask)
        found = masks_of(dataset, number)
        assert {category for category, _ in found} == set(np.unique(values).tolist()) - {0, 255}
        for category, region in found:
            np.testing.assert_array_equal(region, values == category)
    assert dataset.problems == []


def test_declared_classes_report_masks_with_other_values(tmp_path):
    for name in "abc":
        write_image(tmp_path / "images" / f"{name}.png")
    write_mask(tmp_path / "masks/a.png", square(1) + square(2, top=11))
    write_mask(tmp_path / "masks/b.png", square(1) + square(9, top=11))
    write_mask(tmp_path / "masks/c.png", square(2) + square(255, top=11))
    dataset = open_folders(tmp_path, classes=[1, 2, 5])
    assert dataset.categories == {1: "1", 2: "2", 5: "5"}
    assert [[category for category, _ in masks_of(dataset, number)] for number in range(3)] == [[1, 2], [], [2]]
    assert dataset.problems == [
        "mask b.png: holds 9, neither a declared class nor ignored; "
        "add it to --classes or --ignore-values, or correct the mask"
    ]
    assert dataset.categories == {1: "1", 2: "2", 5: "5"}


def test_declared_classes_with_ignored_values_leave_nothing_else(tmp_path):
    write_image(tmp_path / "images/a.png")
    write_image(tmp_path / "images/b.png")
    write_mask(tmp_path / "masks/a.png", square(1) + square(9, top=11))
    write_mask(tmp_path / "masks/b.png", square(1) + square(255, top=11))
    dataset = open_folders(tmp_path, classes=[1], ignore_values=[0, 9])
    assert [category for category, _ in masks_of(dataset, 0)] == [1]
    assert dataset.objects(1) == []
    assert dataset.problems[0].startswith("mask b.png: holds 255, neither")


@pytest.mark.parametrize("classes", [[0, 1], {1, 0, 7}])
def test_declared_classes_make_binary_looking_masks_indices_and_zero_a_class(tmp_path, classes):
    write_image(tmp_path / "images/a.png")
    write_mask(tmp_path / "masks/a.png", square())
    dataset = open_folders(tmp_path, classes=classes)
    assert dataset.notes == ["masks are class indices (looked at 1 of 1, values 0, 1)"]
    found = masks_of(dataset, 0)
    assert [category for category, _ in found] == [0, 1]
    np.testing.assert_array_equal(found[0][1], 1 - square())


def test_classes_that_contradict(tmp_path):
    write_image(tmp_path / "images/a.png")
    write_mask(tmp_path / "masks/a.png", square())
    with pytest.raises(UsageError, match=r"values 1: both --classes and --ignore-values"):
        open_folders(tmp_path, classes=[1, 2], ignore_values=[0, 1])
    for declared in ({"classes": [1]}, {"ignore_values": [0]}):
        with pytest.raises(DatasetError, match="one file per object are binary, not class indices"):
            open_folders(tmp_path, mask_pattern="{stem}*", **declared)


def test_real_street_scenes_with_declared_classes(real_data):
    root = real_data / "camvid"
    folders = {"images": root / "train", "masks": root / "trainannot", "limit": 2}
    declared = open_dataset("masks", **folders, classes=range(11), ignore_values=[11])
    plain = open_dataset("masks", **folders, ignore_values=[11])
    assert [declared.objects(number) for number in range(2)] == [plain.objects(number) for number in range(2)]
    assert declared.problems == []
    narrow = open_dataset("masks", **folders, classes=range(3))
    assert narrow.objects(0) == []
    assert "neither a declared class nor ignored" in narrow.problems[0]
