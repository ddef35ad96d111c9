import contextlib
import copy
import io
import json

import cv2
import numpy as np
import pytest
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sam_cache.evaluation import average_precision

# pycocotools 2.0.11 decodes into an array class that numpy 2 finds old-fashioned.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

STATS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]

LVIS_API = {
    "AP": 0.41983542357174114,
    "AP50": 0.6039009941145994,
    "AP75": 0.4334910824877501,
    "APs": 0.23262061884907093,
    "APm": 0.48849568641074637,
    "APl": 0.781842718433334,
    "APr": 0.8999999999999999,
    "APc": 0.4426760176017601,
    "APf": 0.41250597453193716,
    "AR300": 0.4618014445878668,
    "ARs": 0.26529363370148695,
    "ARm": 0.5249954533770324,
    "ARl": 0.7909017713365539,
}


def by_pycocotools(ground_truth, detections):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(ground_truth)
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(detections)), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(STATS, evaluation.stats.tolist(), strict=True))


def encode(mask):
    encoded = rle.encode(np.asfortranarray(mask, np.uint8))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def perturb(mask, generator):
    """A detector's answer: moved, grown or shrunk."""
    dx, dy = generator.integers(-3, 4, 2)
    moved = np.roll(mask.astype(np.uint8), (int(dy), int(dx)), axis=(0, 1))
    grow = int(generator.integers(-3, 4))
    change = cv2.dilate if grow > 0 else cv2.erode
    return change(moved, np.ones((3, 3), np.uint8), iterations=abs(grow)) if grow else moved


def detect(truth, generator):
    """Perturbed answers for most objects, duplicates, wrong categories and false alarms, scores with ties."""
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    categories = [category["id"] for category in truth["categories"]]
    detections = []
    for annotation in truth["annotations"]:
        height, width = sizes[annotation["image_id"]]
        segmentation = annotation["segmentation"]
        if isinstance(segmentation, list):
            segmentation = rle.merge(rle.frPyObjects(segmentation, height, width))
        mask = rle.decode(segmentation)
        for _ in range(generator.choice([0, 1, 1, 1, 2])):
            category = generator.choice(categories) if generator.random() < 0.1 else annotation["category_id"]
            detections.append(
                {
                    "image_id": annotation["image_id"],
                    "category_id": int(category),
                    "segmentation": encode(perturb(mask, generator)),
                    "score": round(float(generator.random()), 2),
                }
            )
    return detections


def synthetic(generator, images=12, objects=12, categories=3, side=160):
    annotations = []
    for image in range(1, images + 1):
        for _ in range(objects):
            mask = np.zeros((side, side), np.uint8)
            centre = tuple(int(v) for v in generator.integers(0, side, 2))
            axes = tuple(int(v) for v in generator.integers(3, 70, 2))
            cv2.ellipse(mask, centre, axes, float(generator.uniform(0, 180)), 0, 360, 1, -1)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": int(generator.integers(1, categories + 1)),
                    "segmentation": encode(mask),
                    "area": float(mask.sum()),
                    "bbox": [0, 0, 1, 1],
                    "iscrowd": int(generator.random() < 0.1),
                }
            )
    return {
        "images": [{"id": n, "height": side, "width": side} for n in range(1, images + 1)],
        "categories": [{"id": n, "name": str(n)} for n in range(1, categories + 2)],  # the last has no object
        "annotations": annotations,
    }


def assert_equal_to_pycocotools(ground_truth, detections):
    expected = by_pycocotools(ground_truth, detections)
    result = average_precision(ground_truth, detections)
    assert list(result) == STATS
    assert result == pytest.approx(expected, abs=1e-9)
    return result


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_synthetic_equals_pycocotools(seed):
    generator = np.random.default_rng(seed)
    truth = synthetic(generator)
    result = assert_equal_to_pycocotools(truth, detect(truth, generator))
    assert all(0 < value < 1 for value in result.values())


@pytest.mark.parametrize("name", ["nuclei_dsb2018/derived/instances_rle.json", "fruits_nuts/trainval.json"])
def test_real_sets_equal_pycocotools(real_data, name):
    truth = json.loads((real_data / name).read_text())
    result = assert_equal_to_pycocotools(truth, detect(truth, np.random.default_rng(0)))
    assert 0 < result["AP"] < 1


def test_perfect_detections_score_one():
    truth = synthetic(np.random.default_rng(3))
    perfect = [
        {
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "segmentation": a["segmentation"],
            "score": 1.0,
        }
        for a in truth["annotations"]
        if not a["iscrowd"]
    ]
    result = average_precision(truth, perfect)
    assert [result[name] for name in STATS if name not in ("AR1", "AR10")] == pytest.approx([1.0] * 10)


def two_squares():
    masks = np.zeros((2, 60, 60), np.uint8)
    masks[0, 5:25, 5:25] = 1
    masks[1, 30:55, 30:55] = 1
    return [encode(mask) for mask in masks]


def small_truth(**image):
    first, second = two_squares()
    one = {"id": 0, "image_id": 1, "category_id": 1, "segmentation": first, "area": 400.0, "iscrowd": 0}
    return {
        "images": [{"id": 1, "height": 60, "width": 60, **image}],
        "categories": [{"id": 1, "frequency": "r"}, {"id": 2, "frequency": "f"}],
        "annotations": [one],
    }, [
        {"image_id": 1, "category_id": 1, "segmentation": second, "score": 0.9},
        {"image_id": 1, "category_id": 1, "segmentation": first, "score": 0.8},
    ]


def test_a_crowd_is_an_ignore_region():
    truth, detections = small_truth()
    assert average_precision(truth, detections)["AP"] == pytest.approx(0.5)  # a false alarm ranks first
    crowd = truth["annotations"][0] | {"id": 1, "segmentation": two_squares()[1], "iscrowd": 1}
    truth["annotations"].append(crowd)
    assert average_precision(truth, detections)["AP"] == pytest.approx(1)


def test_lvis_judges_only_what_is_known():
    truth, detections = small_truth(neg_category_ids=[], not_exhaustive_category_ids=[])
    elsewhere = {**detections[0], "category_id": 2}  # nobody says whether category 2 is in the image
    result = average_precision(truth, [*detections, elsewhere], "lvis")
    assert list(result) == [*STATS[:6], "AR300", "ARs", "ARm", "ARl", "APr", "APc", "APf"]
    assert result["AP"] == result["APr"] == pytest.approx(0.5)
    assert result["APc"] == result["APf"] == -1

    truth["images"][0]["not_exhaustive_category_ids"] = [1]  # so the unmatched one may be right
    assert average_precision(truth, detections, "lvis")["AP"] == pytest.approx(1)


def test_lvis_frequencies_follow_the_categories():
    truth, detections = small_truth()
    truth["categories"].reverse()
    assert average_precision(truth, detections, "lvis")["APr"] == pytest.approx(0.5)
    for category in truth["categories"]:
        del category["frequency"]
    assert "APr" not in average_precision(truth, detections, "lvis")


def test_lvis_takes_300_detections_per_image():
    truth, detections = small_truth()
    noise, answer = detections
    noise = [{**noise, "category_id": 2}] * 300
    assert average_precision(truth, [*noise[1:], answer], "lvis")["AP"] == pytest.approx(1)
    assert average_precision(truth, [*noise, answer], "lvis")["AP"] == 0


def test_lvis_skips_empty_masks():
    truth, detections = small_truth()
    empty = {**detections[0], "segmentation": encode(np.zeros((60, 60)))}
    assert average_precision(truth, [empty, detections[1]], "lvis")["AP"] == pytest.approx(1)
    assert average_precision(truth, [empty, detections[1]])["AP"] == pytest.approx(0.5)


def test_lvis_equals_lvis_api(real_data):
    """The numbers are those of lvis-api 0.5.3 (`LVISEval`, "segm") for these very detections."""
    truth = json.loads((real_data / "lvis" / "lvis_val_100.json").read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    present = {image["id"]: [*image["neg_category_ids"]] for image in truth["images"]}
    detections = []
    for n, annotation in enumerate(truth["annotations"]):
        image = annotation["image_id"]
        present[image].append(annotation["category_id"])
        shape = rle.decode(rle.merge(rle.frPyObjects(annotation["segmentation"], *sizes[image])))
        detections.append(
            {
                "image_id": image,
                "category_id": present[image][n % len(present[image])] if n % 4 == 0 else annotation["category_id"],
                "segmentation": encode(np.roll(shape, (n % 7 - 3, n % 5 - 2), axis=(0, 1))),
                "score": n * 7919 % 101 / 101,  # with ties
            }
        )
    crowded = max(present, key=lambda image: sum(d["image_id"] == image for d in detections))
    detections += [d | {"score": d["score"] / 2} for d in detections if d["image_id"] == crowded] * 6
    assert average_precision(truth, detections, "lvis") == pytest.approx(LVIS_API)


def test_nothing_found_and_nothing_to_find():
    truth, detections = small_truth()
    assert average_precision(truth, [])["AP"] == 0
    truth["annotations"] = []
    assert average_precision(truth, detections)["AP"] == -1


def test_changes_and_prints_nothing(capfd):
    truth, detections = small_truth()
    before = copy.deepcopy((truth, detections))
    for style in ("coco", "lvis"):
        average_precision(truth, detections, style)
    assert (truth, detections) == before
    assert capfd.readouterr() == ("", "")
