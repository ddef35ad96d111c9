"""Masks for a folder of images that nobody has annotated."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from pycocotools.coco import COCO

from sam_cache.data import Geometry, open_dataset, to_pixels
from sam_cache.model import load_encoder, masks_to_image
from sam_cache.stages.predict import name_masks
from sam_cache.stages.tuned_sam import open_tuned, open_tuned_top, open_whole
from sam_cache.training import RunFolder
from sam_cache.types import Prompts

QUICK = ("--steps", 1, "--warmup", 0, "--learning-rate", 3e-2, "--batch-size", 1, "--held-out", 0, "--prompts", "box",
         "--max-objects", 2)  # fmt: skip
FULL = ("train-full", "--dataset", "synthetic", "--scenes", 2, "--model", "tiny", "--adapter", "sa",
        "--input-size", 64, "--fit", "squash", "--normalise", "minmax")  # fmt: skip
BOXES = [[5, 6, 30, 20], [20.5, 10, 60, 60], [0, 0, 90, 70]]


@pytest.fixture(scope="module")
def run_of(invoke, tmp_path_factory, scenes):
    """A run of `train-top` or of `train-full`, made when it is first asked for. Read only."""
    folder = tmp_path_factory.mktemp("runs")

    def run_of(stage):
        path = folder / stage
        if not path.exists():
            command = FULL if stage == "train-full" else (stage, "--store", scenes)
            assert invoke(*command, "--out", path, *QUICK) == 0
        return path

    return run_of


@pytest.fixture
def images(tmp_path) -> dict[str, np.ndarray]:
    """Two good images, one in a folder of its own, by their names in `images`; RGB."""
    scenes = open_dataset("synthetic", count=2, size=80)
    found = {}
    for record, name in zip(scenes.images, ("a.png", "deep/b.bmp"), strict=True):
        file = tmp_path / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        bgr = cv2.imdecode(np.frombuffer(scenes.read(record), np.uint8), cv2.IMREAD_COLOR)
        cv2.imwrite(str(file), bgr)
        found[name] = bgr[:, :, ::-1].copy()
    return found


@pytest.fixture
def write_boxes(tmp_path):
    """Writes boxes.json from (file name, boxes) pairs; images are 70, 71 and so on, categories 5 and 9 in turn."""

    def write_boxes(pairs, **changes):
        records = [{"id": 70 + n, "file_name": name} for n, (name, _) in enumerate(pairs)]
        boxes = [(70 + n, box) for n, (_, found) in enumerate(pairs) for box in found]
        annotations = [{"id": 300 + n, "image_id": image, "bbox": box, "category_id": (5, 9)[n % 2]}
                       for n, (image, box) in enumerate(boxes)]  # fmt: skip
        categories = [{"id": 5, "name": "five", "supercategory": "numbers"}, {"id": 9, "name": "nine"}]
        content = {"images": records, "annotations": annotations, "categories": categories} | changes
        (tmp_path / "boxes.json").write_text(json.dumps(content))

    return write_boxes


def read(out=Path("predictions")):
    return json.loads((out / "predictions.json").read_text())


def read_mask(name, out=Path("predictions")):
    return cv2.imread(str(out / "masks" / name), cv2.IMREAD_UNCHANGED)


@torch.no_grad()
def by_hand(stage, run, image, boxes):
    """The network called directly: masks (P, H, W) and scores (P,)."""
    run = RunFolder.open(run)
    if stage == "train-full":
        network = open_tuned(run, "best").eval()
        encoder = network.image_encoder
        assert encoder.normalise == "minmax"
    else:
        network, encoder = open_tuned_top(run, "best").eval(), load_encoder("tiny")
    geometry = Geometry(*image.shape[:2], *((64, "squash") if stage == "train-full" else (128,)))
    content = torch.tensor([[geometry.content_height, geometry.content_width]])
    pixels = torch.from_numpy(to_pixels(image, geometry)).permute(2, 0, 1)[None]
    count = max(1, len(boxes))
    corners = [[x, y, x + w, y + h] for x, y, w, h in boxes] or [[0.0] * 4]
    corners = np.clip(corners, 0, (geometry.width, geometry.height) * 2)
    prompts = Prompts(
        image_index=torch.zeros(count, dtype=torch.long),
        kind=torch.zeros(count, dtype=torch.long),
        points_xy_input=torch.zeros(0, 2),
        labels=torch.zeros(0, dtype=torch.long),
        offsets=torch.zeros(count + 1, dtype=torch.long),
        boxes_xyxy_input=torch.from_numpy(geometry.boxes_to_input(corners)).float(),
        has_box=torch.tensor([len(boxes) > 0] * count),
        has_mask=torch.zeros(count, dtype=torch.bool),
        chance=torch.zeros(count, 2),
    )
    masks = network(encoder(pixels, content), prompts, multimask=False)
    shown = masks_to_image(masks.logits[:, 0], geometry.input_size, tuple(content[0].tolist()), image.shape[:2])
    return (shown > 0).numpy(), masks.scores[:, 0].tolist()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # within pycocotools
@pytest.mark.parametrize("stage", ["train-top", "train-full"])
def test_boxes_are_answered_as_by_hand(samcache, run_of, images, write_boxes, stage):
    write_boxes([("a.png", BOXES), ("deep/b.bmp", BOXES[:1])])
    assert samcache("predict", "--run", run_of(stage), "--images", "images", "--boxes", "boxes.json",
                    "--mask-budget", 2) == 0  # fmt: skip
    coco = COCO("predictions/predictions.json")
    assert [coco.imgs[id]["file_name"] for id in (70, 71)] == ["a.png", "deep/b.bmp"]
    masks, scores = by_hand(stage, run_of(stage), images["a.png"], BOXES)
    assert masks.any()
    found = coco.loadAnns(coco.getAnnIds(imgIds=[70]))
    assert [answer["id"] for answer in found] == [300, 301, 302]
    assert [answer["category_id"] for answer in found] == [5, 9, 5]
    numbers = np.zeros(masks.shape[1:], np.uint8)
    for place, (answer, mask, score) in enumerate(zip(found, masks, scores, strict=True)):
        assert isinstance(answer["segmentation"]["counts"], str)
        np.testing.assert_array_equal(coco.annToMask(answer), mask)
        assert answer["score"] == pytest.approx(score, abs=1e-5)
        assert answer["area"] == mask.sum()
        rows, columns = np.nonzero(mask)
        if len(rows):
            x, y = columns.min(), rows.min()
            assert answer["bbox"] == [x, y, columns.max() - x + 1, rows.max() - y + 1]
        numbers[mask] = place + 1
    png = read_mask("a.png")
    assert png.dtype == np.uint8
    np.testing.assert_array_equal(png, numbers)
    assert read_mask("deep/b.png").shape == images["deep/b.bmp"].shape[:2]
    assert coco.imgs[71]["mask_file"] == "masks/deep/b.png"
    assert coco.cats[5] == {"id": 5, "name": "five", "supercategory": "numbers"}
    assert COCO("predictions/predictions.json").loadRes(read()["annotations"]).anns


@pytest.mark.parametrize("stage", ["train-top", "train-full"])
def test_without_prompts_each_image_has_one_mask(samcache, run_of, images, stage):
    assert samcache("predict", "--run", run_of(stage), "--images", "images", "--prompts", "none") == 0
    found = read()
    assert [image["file_name"] for image in found["images"]] == ["a.png", "deep/b.bmp"]
    assert [answer["image_id"] for answer in found["annotations"]] == [image["id"] for image in found["images"]]
    assert {answer["category_id"] for answer in found["annotations"]} == {1} == {c["id"] for c in found["categories"]}
    for name, image in images.items():
        masks, _ = by_hand(stage, run_of(stage), image, [])
        np.testing.assert_array_equal(read_mask(Path(name).with_suffix(".png")), 255 * masks[0].astype(np.uint8))


def test_the_whole_network_of_train_top_is_base_encoder_and_tuned_top(run_of):
    run = RunFolder.open(run_of("train-top"))
    whole, top = open_whole(run, "best").state_dict(), open_tuned_top(run, "best").state_dict()
    assert all(torch.equal(whole[name], value) for name, value in top.items())


def test_bad_images_and_boxes_are_told_and_the_rest_goes_on(samcache, run_of, images, write_boxes, capsys, tmp_path):
    height, width = images["a.png"].shape[:2]
    (tmp_path / "images" / "broken.png").write_bytes((tmp_path / "images" / "a.png").read_bytes()[:200])
    (tmp_path / "secret.png").write_bytes((tmp_path / "images" / "a.png").read_bytes())
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    outside, over, flat = [width + 5, 3, 9, 9], [-4, -4, 5 + width, 5 + height], [5, 5, 0, 9]
    pairs = [("a.png", [outside, over, flat, BOXES[0]]), ("broken.png", BOXES[:1]), ("link.png", BOXES[:1]),
             ("../secret.png", BOXES[:1]), (str(tmp_path / "secret.png"), BOXES[:1]), ("gone.png", BOXES[:1]),
             ("./deep/b.bmp", []), ("a.png", BOXES[:1])]  # fmt: skip
    write_boxes(pairs)
    content = json.loads((tmp_path / "boxes.json").read_text())
    content["annotations"] += [{"id": 1, "image_id": 999, "bbox": [1, 1, 2, 2], "category_id": 5},
                               {"id": 2, "image_id": 70, "bbox": [1, 1, 2], "category_id": 5},
                               {"id": 3, "image_id": 70, "category_id": 5}]  # fmt: skip
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    common = ("predict", "--run", run_of("train-top"), "--images", "images", "--boxes", "boxes.json")
    assert samcache(*common) == 0
    found = read()
    assert [image["file_name"] for image in found["images"]] == ["a.png", "deep/b.bmp"]
    assert [answer["id"] for answer in found["annotations"]] == [301, 303]
    assert not read_mask("deep/b.png").any()
    told = found["info"]["problems"]
    assert len(told) == 11
    for words in ("'../secret.png'", f"'{tmp_path / 'secret.png'}'", "'gone.png'", "'a.png' occurs twice",
                  "no image has the id 999", "annotation 12", "annotation 13", "box 300 ", "box 302 ", "broken.png",
                  "link.png"):  # fmt: skip
        assert sum(words in line for line in told) == 1, words
    assert capsys.readouterr().err.count("left out: ") == 11
    write_boxes([("a.png", [[0, 0, width, height]])])
    assert samcache(*common) == 0
    whole = read()["annotations"][0]
    assert whole["segmentation"] == found["annotations"][0]["segmentation"]


def test_an_earlier_prediction_is_replaced_and_other_masks_are_not(samcache, run_of, images, write_boxes, tmp_path):
    common = ("predict", "--run", run_of("train-top"), "--images", "images")
    assert samcache(*common, "--prompts", "none", "--out", "images/out") == 0
    assert len(read(tmp_path / "images" / "out")["images"]) == 2
    write_boxes([("a.png", BOXES)])
    assert samcache(*common, "--boxes", "boxes.json", "--out", "images/out") == 0
    left = sorted(str(file.relative_to("images/out")) for file in Path("images/out").rglob("*"))
    assert left == ["masks", "masks/a.png", "predictions.json"]
    assert samcache(*common, "--prompts", "none", "--out", "images/out") == 0
    assert [image["file_name"] for image in read(tmp_path / "images" / "out")["images"]] == ["a.png", "deep/b.bmp"]

    (tmp_path / "data" / "masks").mkdir(parents=True)
    (tmp_path / "data" / "masks" / "a.png").write_text("drawn by hand")
    assert samcache(*common, "--prompts", "none", "--out", "data") == 2
    assert (tmp_path / "data" / "masks" / "a.png").read_text() == "drawn by hand"


def test_many_objects_take_wider_numbers(samcache, run_of, images, write_boxes):
    """The last of them is the whole image, so that it is seen."""
    height, width = images["a.png"].shape[:2]
    write_boxes([("a.png", [[2, 2, 9, 9]] * 299 + [[0, 0, width, height]])])
    assert samcache("predict", "--run", run_of("train-top"), "--images", "images", "--boxes", "boxes.json",
                    "--mask-budget", 300) == 0  # fmt: skip
    png = read_mask("a.png")
    assert png.dtype == np.uint16
    assert png.max() == max(place for place, answer in enumerate(read()["annotations"], start=1) if answer["area"])


def test_sizes_in_the_box_file_are_held_against_the_images(samcache, run_of, images, write_boxes, capsys):
    records = [{"id": 70, "file_name": "a.png", "height": 1, "width": 1}, {"id": 71, "file_name": "deep/b.bmp"}]
    write_boxes([("a.png", BOXES), ("deep/b.bmp", BOXES)], images=records)
    assert samcache("predict", "--run", run_of("train-top"), "--images", "images", "--boxes", "boxes.json") == 0
    assert "differs from 1x1 in the annotation" in capsys.readouterr().err
    assert [image["id"] for image in read()["images"]] == [71]


@pytest.mark.parametrize(("content", "words"), [
    ("{", "broken JSON"),
    ("[]", "not a COCO file"),
    ('{"images": [], "annotations": []}', "none of its 0 images"),
    ('{"images": [{"id": 1, "file_name": "z.png"}], "annotations": []}', "none of its 1 images"),
    ('{"images": [{"id": 1, "file_name": "a.png"}, {"id": 1, "file_name": "b"}], "annotations": []}', "id 1 occurs"),
    (None, "cannot be read"),
])  # fmt: skip
def test_a_box_file_that_cannot_be_used_is_one_line(samcache, run_of, images, capsys, tmp_path, content, words):
    if content is not None:
        (tmp_path / "boxes.json").write_text(content)
    assert samcache("predict", "--run", run_of("train-top"), "--images", "images", "--boxes", "boxes.json") == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ")
    assert words in said
    assert "boxes.json" in said
    assert not (tmp_path / "predictions").exists()


@pytest.mark.parametrize(("arguments", "code", "words"), [
    ((), 2, "--boxes FILE"),
    (("--prompts", "none", "--boxes", "boxes.json"), 2, "leave one of the two"),
    (("--prompts", "none", "--images", "nowhere"), 1, "nowhere: no such folder"),
    (("--prompts", "none", "--run", "nowhere"), 1, "no run there"),
])  # fmt: skip
def test_what_makes_no_sense_is_one_line(samcache, run_of, images, capsys, arguments, code, words):
    assert samcache("predict", "--run", run_of("train-top"), "--images", "images", *arguments) == code
    assert words in capsys.readouterr().err


def test_without_a_single_usable_image_nothing_is_written(samcache, run_of, capsys, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "text.jpg").write_text("not a picture")
    assert samcache("predict", "--run", run_of("train-top"), "--images", "images", "--prompts", "none") == 1
    assert "none of 1 images can be used" in capsys.readouterr().err
    assert not list((tmp_path / "predictions").iterdir())


def test_no_two_images_share_a_mask_file():
    paths = ["a.jpg", "a.png", "a.jpg.png", "b/a.png", "c.tif", "c.tif.png"]
    names = name_masks(paths)
    assert len(set(names.values())) == len(paths)
    assert names["b/a.png"] == "masks/b/a.png"
    assert names["a.jpg"] == "masks/a.jpg.png"
