"""What is wrong is recorded and reported; what is right is embedded; nothing is lost."""

import json
import shutil

import cv2
import numpy as np
import pytest

from sam_cache.store import FAILED, OK, EmbeddingStore

TINY = ("--model", "tiny", "--shard-rows", 4, "--batch-size", 3, "--store", "s.zarr")


def box_annotation(number, image, x, y, w, h, **changes):
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    return {"id": number, "image_id": image, "category_id": 1, "segmentation": [polygon], "area": w * h,
            "bbox": [x, y, w, h], "iscrowd": 0} | changes  # fmt: skip


@pytest.fixture
def dataset(tmp_path, real_data):
    """Four good images among nine bad ones, each with an annotation."""
    images = tmp_path / "images"
    images.mkdir()
    good = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    cv2.imwrite(str(images / "good.png"), good)
    cv2.imwrite(str(images / "grey.png"), good[:, :, 0])
    cv2.imwrite(str(images / "deep.png"), good.astype(np.uint16) * 257)
    cv2.imwrite(str(images / "one.png"), good[:1, :1])
    (tmp_path / "secret.png").write_bytes((images / "good.png").read_bytes())
    for name in ("pillow/truncated_jpeg.jpg", "pillow/broken.png", "pillow/pil_sample_cmyk.jpg"):
        shutil.copy(real_data / "odd" / name, images)
    (images / "empty.jpg").write_bytes(b"")
    (images / "text.jpg").write_text("not a picture")
    (images / "link.png").symlink_to(tmp_path / "secret.png")
    files = [
        ("good.png", 60, 80, OK),
        ("missing.png", 60, 80, FAILED),
        ("truncated_jpeg.jpg", 100, 100, FAILED),
        ("broken.png", 10, 10, FAILED),
        ("grey.png", 60, 80, OK),
        ("good.png", 61, 80, FAILED),  # another size than the file
        ("../secret.png", 60, 80, FAILED),
        (str(tmp_path / "secret.png"), 60, 80, FAILED),
        ("deep.png", 60, 80, OK),
        ("empty.jpg", 60, 80, FAILED),
        ("text.jpg", 60, 80, FAILED),
        ("link.png", 60, 80, FAILED),
        ("one.png", 1, 1, OK),
        ("pil_sample_cmyk.jpg", 100, 100, OK),
    ]
    records = [{"id": 10 + n, "file_name": name, "height": h, "width": w} for n, (name, h, w, _) in enumerate(files)]
    annotations = [box_annotation(n + 1, record["id"], 0, 0, record["width"], record["height"])
                   for n, record in enumerate(records)]  # fmt: skip
    annotations += [
        box_annotation(100, 10, 500, 500, 20, 20),  # outside of the image
        box_annotation(101, 10, 5, 5, 9, 9, category_id=77),
        box_annotation(102, 999, 5, 5, 9, 9),  # of no image
        box_annotation(103, 10, 5, 5, 9, 9, segmentation=[]),
        box_annotation(104, 10, 5, 5, 9, 9, iscrowd=1),
    ]
    content = {"images": records, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    return [state for *_, state in files]


COCO = ("embed", "--dataset", "coco", "--images", "images", "--annotations", "a.json")


def test_every_image_keeps_its_row_and_the_bad_ones_say_why(samcache, dataset, tmp_path, capsys):
    assert samcache(*COCO, *TINY) == 0
    said = capsys.readouterr().err
    assert f"5 of {len(dataset)} images embedded, 9 failed" in said
    store = EmbeddingStore.open(tmp_path / "s.zarr")
    assert store.row_states.tolist()[: len(dataset)] == dataset
    assert [row for row, _ in store.failures()] == [row for row, state in enumerate(dataset) if state == FAILED]
    for row, message in store.failures():
        assert store.images.paths[row] in message or "/" in store.images.paths[row]
    assert store.objects()["iscrowd"].sum() == 1
    assert samcache("verify", "--store", "s.zarr") == 0
    assert samcache(*COCO, *TINY, "--strict") == 1
    assert samcache("train-top", "--store", "s.zarr", "--steps", 1, "--out", "run", "--prompts", "box") == 0
    assert samcache("eval", "--store", "s.zarr", "--run", "run", "--rows", "all", "--out", "eval") == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [', "broken JSON"),
        ('{"images": [{"id": 1, "file_name": "a.png"}], "annotations": [], "categories": []}', "height"),
        ("[]", "not COCO"),
        (json.dumps({"images": [{"id": 1, "height": 4, "width": 4, "file_name": n} for n in "ab"],
                     "annotations": [], "categories": []}), "occurs twice"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_dataset_is_one_line(samcache, tmp_path, capsys, text, message):
    (tmp_path / "images").mkdir()
    (tmp_path / "a.json").write_text(text)
    assert samcache(*COCO, *TINY) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert message in error[0]
    assert "a.json" in error[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("embed", "--dataset", "lvis"), "lvis_v1_train.json"),
        (("embed", "--dataset", "coco", "--root", "nowhere"), "instances_train2017.json"),
        (("embed", "--dataset", "synthetic"), "sam_vit_h_4b8939.pth"),
        (("train-top", "--store", "emb.zarr"), "samcache embed"),
        (("eval",), "emb.zarr"),
        (("verify",), "emb.zarr"),
    ],
)
def test_what_is_missing_is_named_with_its_remedy(samcache, capsys, arguments, message):
    assert samcache(*arguments) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error


def test_an_unfinished_store_is_refused_unless_partial(samcache, scenes, tmp_path, capsys):
    store = tmp_path / "half.zarr"
    shutil.copytree(scenes, store)
    shard = store / "neck" / "c" / "1" / "0" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[7] ^= 255
    shard.write_bytes(bytes(data))
    samcache("verify", "--store", store, "--repair")
    train = ("train-top", "--store", store, "--steps", 1, "--prompts", "box", "--out")
    capsys.readouterr()
    assert samcache(*train, "a") == 1
    assert "1 of 3 shards are not committed" in capsys.readouterr().err
    assert samcache(*train, "b", "--partial") == 0
    assert samcache("eval", "--store", store) == 1
    assert samcache("eval", "--store", store, "--partial", "--rows", "all", "--out", "e", "--prompts", "box") == 0


def test_other_annotations_replace_the_stores_objects(samcache, dataset, tmp_path, capsys):
    samcache(*COCO, *TINY)
    content = json.loads((tmp_path / "a.json").read_text())
    content["annotations"] = [box_annotation(1, 10, 10, 10, 30, 20), box_annotation(2, 14, 10, 10, 30, 20)]
    (tmp_path / "b.json").write_text(json.dumps(content))
    arguments = ("eval", "--store", "s.zarr", "--rows", "all", "--prompts", "box", "--json", "r.json", "--out", "e")
    assert samcache(*arguments, "--annotations", "b.json") == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["untouched"]["box"]["all"]["objects"] == 2
    content["images"] = [image | {"id": image["id"] + 1000} for image in content["images"]]
    (tmp_path / "c.json").write_text(json.dumps(content | {"annotations": []}))
    assert samcache(*arguments, "--annotations", "c.json") == 1
    assert "none of its 14 image ids" in capsys.readouterr().err


def test_a_failed_image_can_be_tried_again(samcache, tmp_path):
    (tmp_path / "images").mkdir()
    picture = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "images" / "a.png"), picture)
    records = [{"id": n, "file_name": name, "height": 60, "width": 80} for n, name in enumerate(("a.png", "b.png"))]
    annotations = [box_annotation(n + 1, n, 10, 10, 30, 20) for n in range(2)]
    content = {"images": records, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert samcache(*COCO, *TINY, "--strict") == 1
    cv2.imwrite(str(tmp_path / "images" / "b.png"), picture)
    assert samcache(*COCO, *TINY, "--strict") == 1  # committed is committed
    assert samcache("verify", "--store", "s.zarr", "--retry-failed") == 0
    assert samcache(*COCO, *TINY, "--strict") == 0
    assert EmbeddingStore.open(tmp_path / "s.zarr").row_states.tolist() == [OK, OK]
