import json
import subprocess
import sys
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO

from sam_cache.data import coco, open_dataset, rle_to_mask
from sam_cache.data.lvis import name_image
from sam_cache.errors import DatasetError

URL = "http://images.cocodataset.org/{}"


def write_file(file, images):
    categories = [{"id": 3, "name": "aerosol_can", "frequency": "c", "synset": "aerosol.n.02"}]
    square = {"segmentation": [[2, 2, 8, 2, 8, 8]], "category_id": 3, "bbox": [2, 2, 6, 6], "area": 18.0}
    annotations = [square | {"id": number, "image_id": image["id"]} for number, image in enumerate(images, 1)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def write_image(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (30, 20), (9, 200, 30)).save(file)


def v1_images():
    paths = ["train2017/000000000009.jpg", "val2017/000000000025.jpg"]
    return [{"id": 25 - i, "coco_url": URL.format(path), "height": 20, "width": 30} for i, path in enumerate(paths)]


@pytest.mark.parametrize("folder", [".", "annotations"])
def test_version_1_in_the_standard_layout(tmp_path, folder):
    write_file(tmp_path / folder / "lvis_v1_val.json", v1_images())
    for name in ("train2017/000000000009.jpg", "val2017/000000000025.jpg"):
        write_image(tmp_path / name)
    dataset = open_dataset("lvis", root=tmp_path, split="val")
    assert [(record.id, record.path) for record in dataset.images] == [
        (25, "train2017/000000000009.jpg"),
        (24, "val2017/000000000025.jpg"),
    ]
    assert all(dataset.read(record) for record in dataset.images)
    assert [object.category for object in dataset.objects(1)] == [3]
    assert not dataset.objects(1)[0].iscrowd
    assert dataset.categories == {3: "aerosol_can"}
    assert dataset.problems == []
    with pytest.raises(DatasetError, match=r"lvis_v1_train.json: no such file; get it from .*lvisdataset"):
        open_dataset("lvis", root=tmp_path)


def test_version_1_with_all_images_in_one_folder(tmp_path):
    write_file(tmp_path / "file.json", v1_images())
    write_image(tmp_path / "flat" / "000000000009.jpg")
    dataset = open_dataset("lvis", images=tmp_path / "flat", annotations=tmp_path / "file.json")
    assert [record.path for record in dataset.images] == ["000000000009.jpg", "000000000025.jpg"]


@given(st.text("a./b", min_size=1))
def test_images_are_named_by_the_last_two_parts_of_their_address(address):
    path = PurePosixPath(address)
    found = name_image(coco.Image(1, 2, 3, "", address), Path("/nowhere"), divided=True)
    assert found == f"{path.parent.name}/{path.name}"


@pytest.mark.parametrize(
    ("there", "path"),
    [
        ("val2017/000000000009.jpg", "val2017/000000000009.jpg"),
        ("000000000009.jpg", "000000000009.jpg"),
        ("COCO_val2014_000000000009.jpg", "COCO_val2014_000000000009.jpg"),
    ],
)
def test_version_05_is_found_where_it_lies(tmp_path, there, path):
    name = "COCO_val2014_000000000009.jpg"
    url = URL.format("val2017/000000000009.jpg")
    write_file(
        tmp_path / "lvis_v0.5_val.json", [{"id": 9, "file_name": name, "coco_url": url, "height": 20, "width": 30}]
    )
    write_image(tmp_path / there)
    dataset = open_dataset("lvis", root=tmp_path, split="val")
    assert dataset.images[0].path == path
    assert dataset.read(dataset.images[0])


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools under NumPy 2
def test_real_version_05_against_pycocotools(real_data, tmp_path):
    file = real_data / "lvis/lvis_val_100.json"
    (tmp_path / "val2017").mkdir()
    dataset = open_dataset("lvis", images=tmp_path, annotations=file)
    oracle = COCO(file)
    assert len(dataset.images) == 100
    assert len(dataset.categories) == 1230
    assert dataset.images[0].path == "val2017/000000266409.jpg"
    objects = 0
    for number, record in enumerate(dataset.images):
        found = dataset.objects(number)
        objects += len(found)
        for object in found[:2]:
            expected = oracle.annToMask(oracle.anns[object.id])
            np.testing.assert_array_equal(rle_to_mask(object.rle, record.height, record.width), expected)
            assert object.category == oracle.anns[object.id]["category_id"]
    assert objects == 977
    assert dataset.problems == []


@pytest.mark.slow
def test_memory_stays_near_the_size_of_the_file():
    """At 1/80 of lvis_v1_train.json; `measure_lvis.py` alone measures the whole."""
    program = Path(__file__).parent / "measure_lvis.py"
    done = subprocess.run([sys.executable, program, "--scale", "0.0125"], check=True, capture_output=True, text=True)
    measured = json.loads(done.stdout)
    assert measured["objects"] > 15_000
    assert measured["problems"] == 0
    assert measured["growth_bytes"] < 1.8 * measured["file_bytes"]
