"""Average precision of masks, as the COCO and LVIS benchmarks define it, by faster-coco-eval."""

from typing import Literal

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster, mask

LVIS_DETECTIONS_PER_IMAGE = 300  # lvis-api: LVISResults(max_dets=300), over all categories together


def average_precision(
    ground_truth: dict, detections: list[dict], style: Literal["coco", "lvis"] = "coco"
) -> dict[str, float]:
    """AP and AR of `detections` against a COCO-format `ground_truth`; neither is changed.

    A detection has `image_id`, `category_id`, `segmentation` (RLE at the image's size) and `score`.
    Objects with `iscrowd` are regions where detections count neither for nor against.

    `coco` gives AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl. `lvis` gives AR300
    for the three ARs by number of detections, judges each image only on the categories known to be
    present or absent there (`neg_category_ids`, `not_exhaustive_category_ids`), skips empty masks as
    lvis-api does, and adds APr, APc, APf where every category has its `frequency`. A value that
    nothing defines is -1, as in COCO.
    """
    lvis = style == "lvis"
    frequencies = [category.get("frequency") for category in ground_truth["categories"]]
    annotations = ground_truth["annotations"]
    if lvis:
        annotations = [annotation for annotation in annotations if annotation["area"] > 0]
        detections = [d for d in _best_of_each_image(detections) if mask.area(d["segmentation"]) > 0]

    truth = COCO(_writable(ground_truth, annotations))
    found = truth.loadRes(
        [{key: d[key] for key in ("image_id", "category_id", "segmentation", "score")} for d in detections]
    )
    evaluator = COCOeval_faster(truth, found, iouType="segm", lvis_style=lvis)
    if lvis:
        evaluator.params.maxDets = [LVIS_DETECTIONS_PER_IMAGE]
    evaluator.evaluate()
    evaluator.accumulate()

    precision = evaluator.eval["precision"]  # IoU threshold, recall, category, area, detections
    recall = evaluator.eval["recall"]  # IoU threshold, category, area, detections
    counts = evaluator.params.maxDets
    result = {"AP": _mean(precision[:, :, :, 0, -1])}
    for threshold in (50, 75):
        at = np.isclose(evaluator.params.iouThrs, threshold / 100)
        result[f"AP{threshold}"] = _mean(precision[at, :, :, 0, -1])
    for area, size in enumerate("sml", start=1):
        result[f"AP{size}"] = _mean(precision[:, :, :, area, -1])
    for index, count in enumerate(counts):
        result[f"AR{count}"] = _mean(recall[:, :, 0, index])
    for area, size in enumerate("sml", start=1):
        result[f"AR{size}"] = _mean(recall[:, :, area, -1])
    if lvis and all(frequencies):
        order = np.argsort([category["id"] for category in ground_truth["categories"]])
        for frequency in "rcf":
            columns = [k for k, index in enumerate(order) if frequencies[index] == frequency]
            result[f"AP{frequency}"] = _mean(precision[:, :, columns, 0, -1])
    return result


def _mean(values: np.ndarray) -> float:
    """Over what is defined: -1 marks a category without objects."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else -1.0


def _best_of_each_image(detections: list[dict]) -> list[dict]:
    kept: dict[int, list[dict]] = {}
    for detection in sorted(detections, key=lambda d: -d["score"]):
        best = kept.setdefault(detection["image_id"], [])
        if len(best) < LVIS_DETECTIONS_PER_IMAGE:
            best.append(detection)
    return [detection for best in kept.values() for detection in best]


def _writable(ground_truth: dict, annotations: list[dict]) -> dict:
    """A copy the evaluator may write to. Annotations are numbered from 1: it takes 0 for "unmatched"."""
    return {
        "images": [dict(image) for image in ground_truth["images"]],
        "categories": [{"frequency": "f", **category} for category in ground_truth["categories"]],
        "annotations": [{**annotation, "id": number} for number, annotation in enumerate(annotations, start=1)],
    }
