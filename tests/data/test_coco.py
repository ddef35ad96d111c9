import json
import os

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from sam_cache.data import decode, open_annotations, open_dataset, rle_to_mask
from sam_cache.errors import DatasetError, ImageError

SQUARE = [[2, 2, 8, 2, 8, 8, 2, 8]]


@pytest.fixture
def write(tmp_path):
    """Write an annotation file and the images it names; give the arguments that open it."""

    def write(images, annotations, categories=({"id": 1, "name": "thing"},)):
        (tmp_path / "images").mkdir(exist_ok=True)
        for image in images:
            if os.path.basename(image["file_name"]) == image["file_name"]:
                size = image["width"], image["height"]
                Image.new("RGB", size, (200, 100, 50)).save(tmp_path / "images" / image["file_name"])
        file = tmp_path / "annotations.json"
        file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": list(categories)}))
        return {"kind": "coco", "images": tmp_path / "images", "annotations": file}

    return write


def image(id=1, file_name="a.png", **more):
    return {"id": id, "file_name": file_name, "height": 20, "width": 30} | more


def annotation(id=1, image_id=1, category_id=1, segmentation=SQUARE, **more):
    return {"id": id, "image_id": image_id, "category_id": category_id, "segmentation": segmentation} | more


REAL = {
    "fruits_nuts/trainval.json": ("fruits_nuts", 18, 165, 3),
    "coco_sample/panoptic_coco_detection_format.json": ("coco_sample/input_images", 2, 50, 133),
    "nuclei_dsb2018/derived/instances_rle.json": ("nuclei_dsb2018", 40, 1517, 1),
    "spacenet_sample/coco_sample_2.json": ("spacenet_sample", 1, 43, 2),
    "spacenet_sample/derived/buildings_coco.json": ("spacenet_sample", 1, 43, 1),
    "labelme_voc/data_dataset_coco/annotations.json": ("labelme_voc/data_dataset_coco", 3, 12, 21),
}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools under NumPy 2
@pytest.mark.parametrize("name", REAL)
def test_real_files_against_pycocotools(real_data, name, capsys):
    folder, images, objects, categories = REAL[name]
    dataset = open_dataset("coco", images=real_data / folder, annotations=real_data / name)
    oracle = COCO(real_data / name)
    assert len(dataset.images) == images
    assert [record.id for record in dataset.images] == [entry["id"] for entry in oracle.dataset["images"]]
    assert len(dataset.categories) == categories
    assert all(isinstance(category, str) for category in dataset.categories.values())
    count = 0
    for number, record in enumerate(dataset.images):
        found = {object.id: object for object in dataset.objects(number)}
        count += len(found)
        assert sorted(found) == sorted(oracle.getAnnIds(record.id))
        for expected in oracle.loadAnns(list(found)[:5]):
            if isinstance(expected["segmentation"], list) and isinstance(expected["segmentation"][0], float):
                expected["segmentation"] = [expected["segmentation"]]  # spacenet's missing outer list
            object = found[expected["id"]]
            mask = rle_to_mask(object.rle, record.height, record.width)
            np.testing.assert_array_equal(mask, oracle.annToMask(expected))
            assert object.category == expected["category_id"]
            assert object.area == expected["area"]
            assert object.iscrowd == bool(expected["iscrowd"])
            x, y, w, h = (int(value) for value in object.box_xywh_image)
            assert mask[y : y + h, x : x + w].sum() == mask.sum()
            assert mask[y].any()
            assert mask[y + h - 1].any()
            assert mask[:, x].any()
            assert mask[:, x + w - 1].any()
        assert decode(dataset.read(record), record).image.shape == (record.height, record.width, 3)
    assert count == objects
    assert dataset.problems == []


def test_every_kind_of_segmentation(write):
    mask = np.zeros((20, 30), np.uint8)
    mask[2:8, 2:8] = 1
    flat = mask.ravel(order="F")
    counts = np.diff(np.flatnonzero(np.diff(flat, prepend=2, append=2))).tolist()
    rle = {"size": [20, 30], "counts": counts}
    kinds = [SQUARE, SQUARE[0], rle, rle]
    dataset = open_dataset(
        **write([image()], [annotation(i, segmentation=kind, iscrowd=i // 3) for i, kind in enumerate(kinds)])
    )
    objects = dataset.objects(0)
    assert [object.iscrowd for object in objects] == [False, False, False, True]
    for object in objects:
        np.testing.assert_array_equal(rle_to_mask(object.rle, 20, 30), mask)
        assert object.box_xywh_image == (2, 2, 6, 6)
        assert object.area == 36


def test_standard_layout(tmp_path):
    (tmp_path / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        (tmp_path / split).mkdir()
        Image.new("RGB", (30, 20)).save(tmp_path / split / "a.jpg")
        contents = {"images": [image(len(split), "a.jpg")], "annotations": [], "categories": []}
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(contents))
    train = open_dataset("coco", root=tmp_path)
    assert train.images[0].id == len("train2017")
    assert train.notes == ["split train2017"]
    assert train.read(train.images[0]) == (tmp_path / "train2017/a.jpg").read_bytes()
    assert open_dataset("coco", root=tmp_path, split="val2017").images[0].id == len("val2017")
    with pytest.raises(DatasetError, match=r"instances_test.json: no such file; get .*cocodataset"):
        open_dataset("coco", root=tmp_path, split="test")


def test_images_in_an_inner_folder(write):
    arguments = write([image()], [])
    dataset = open_dataset(**arguments | {"images": arguments["images"].parent})
    assert dataset.images[0].path == "a.png"
    assert dataset.read(dataset.images[0])


def test_order_of_the_file_and_limit(write):
    images = [image(id, f"{id}.png") for id in (7, 3, 9, 1)]
    dataset = open_dataset(**write(images, [annotation(1, 9), annotation(2, 7), annotation(3, 9)]), limit=3)
    assert [record.id for record in dataset.images] == [7, 3, 9]
    assert [[object.id for object in dataset.objects(number)] for number in range(3)] == [[2], [], [1, 3]]
    assert dataset.problems == []


def test_bad_file_names_keep_their_row(write, tmp_path):
    (tmp_path / "outside.png").write_bytes(b"x")
    names = ["a.png", "../outside.png", str(tmp_path / "outside.png"), "missing/b.png", "c.png"]
    dataset = open_dataset(**write([image(i, name) for i, name in enumerate(names)], []))
    assert [record.path for record in dataset.images] == names
    assert dataset.read(dataset.images[0])
    assert dataset.read(dataset.images[4])
    for record in dataset.images[1:4]:
        with pytest.raises(ImageError):
            dataset.read(record)


def test_bad_annotations_are_left_out_and_reported_once(write):
    bad = {
        2: ("unknown category 5", {"category_id": 5}),
        3: ("covers no pixel", {"segmentation": [[40, 40, 50, 40, 50, 50]]}),
        4: ("fewer than three points", {"segmentation": []}),
        5: ("mask of 3x3 in an image of 30x20", {"segmentation": {"size": [3, 3], "counts": [0, 9]}}),
        6: ("neither polygons nor run lengths", {"segmentation": None}),
        7: ("Expected `int`", {"category_id": "x"}),
        8: ("Expected `float | null`", {"area": "big"}),
    }
    entries = [annotation(id, **change) for id, (_, change) in bad.items()]
    dataset = open_dataset(**write([image()], [annotation(1), *entries, annotation(9)]))
    for _ in range(2):
        assert [object.id for object in dataset.objects(0)] == [1, 9]
        assert len(dataset.problems) == len(bad)
    for (id, (words, _)), problem in zip(bad.items(), dataset.problems, strict=True):
        assert problem.startswith(f"image 1 (a.png), annotation {id}: ")
        assert words in problem
        assert "\n" not in problem


def test_annotations_that_belong_nowhere(write):
    entries = [annotation(1), annotation(2, image_id=99), annotation(3, image_id=98), {"id": 4}, 5]
    dataset = open_dataset(**write([image()], entries))
    assert [object.id for object in dataset.objects(0)] == [1]
    problems = "\n".join(dataset.problems)
    assert "annotation at position 3: Object missing required field `image_id`" in problems
    assert "annotation at position 4: Expected `object`" in problems
    assert "2 annotations are of images that are not listed (for example annotation 3, of image 98)" in problems


def test_repeated_annotation_ids_are_renumbered(write):
    dataset = open_dataset(**write([image(1), image(2, "b.png")], [annotation(7), annotation(7, 2), annotation(8, 2)]))
    assert [object.id for number in range(2) for object in dataset.objects(number)] == [1, 2, 3]
    assert dataset.problems[0].endswith("1 annotation ids occur before; objects are numbered by position")


def test_image_size_that_cannot_be(write):
    huge = image(1, "x/a.png", height=2**30, width=2**30)
    unknown = image(2, "x/b.png", height=0, width=0)
    dataset = open_dataset(**write([huge, unknown], [annotation(1), annotation(2, 2)]))
    assert dataset.objects(0) == dataset.objects(1) == []
    assert [problem.rpartition(": ")[2] for problem in dataset.problems] == [
        "image size 1073741824x1073741824 cannot be",
        "image size 0x0 cannot be",
    ]


GOOD = b'{"images": [], "annotations": [], "categories": []}'


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (b"", "cannot be read"),
        (GOOD[:30], "broken JSON: Input data was truncated, of 30 bytes"),
        (GOOD.replace(b"[]", b"[,]", 1), r"broken JSON: .*\(byte 12\)"),
        (b"[" * 100_000, "not COCO instance annotations: Expected `object`, got `array`"),
        (b'{"images": ' + b"[" * 100_000, "not COCO"),
        (GOOD.replace(b'"annotations": []', b'"annotations": [' + b"[" * 100_000), "broken JSON"),
        (b'{"images": [], "categories": []}', "missing required field `annotations`"),
        (GOOD.replace(b"[]", b'[{"id": "x", "height": 1, "width": 1}]', 1), r"Expected `int`, .* `\$.images\[0\].id`"),
        (GOOD.replace(b"[]", b'[{"id": 1, "height": -1, "width": 1}]', 1), r"`int` >= 0 .* `\$.images\[0\].height`"),
        (GOOD.replace(b"[]", b'[{"id": 1e40, "height": 1, "width": 1}]', 1), r"`\$.images\[0\].id`"),
        (
            GOOD.replace(b"[]", b"[" + b", ".join([b'{"id": 4, "height": 1, "width": 1}'] * 2) + b"]", 1),
            "image id 4 occurs twice",
        ),
    ],
)
def test_files_that_cannot_be_used(tmp_path, contents, words):
    file = tmp_path / "broken.json"
    file.write_bytes(contents)
    with pytest.raises(DatasetError, match=words) as error:
        open_dataset("coco", images=tmp_path, annotations=file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_integers_written_as_text_or_float(write):
    dataset = open_dataset(**write([image("4", width=30)], [annotation(1.0, image_id="4", iscrowd=True)]))
    assert dataset.images[0].id == 4
    assert dataset.objects(0)[0].iscrowd


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "no annotations given"),
        ({"annotations": "missing.json", "images": "."}, "cannot be read"),
        ({"annotations": "annotations.json"}, "image folder is missing"),
        ({"annotations": "annotations.json", "images": "nowhere"}, "no such folder"),
    ],
)
def test_what_is_missing_is_named(write, tmp_path, arguments, words):
    write([image()], [])
    with pytest.raises(DatasetError, match=words):
        open_dataset("coco", **{name: tmp_path / value for name, value in arguments.items()})


def test_objects_alone(write):
    dataset = open_annotations(write([image()], [annotation()])["annotations"])
    assert [object.id for object in dataset.objects(0)] == [1]


def test_unknown_format():
    with pytest.raises(DatasetError, match="unknown dataset format 'voc'; choose one of coco, lvis"):
        open_dataset("voc")
