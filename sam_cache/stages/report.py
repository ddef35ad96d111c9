"""An evaluation for people and for COCO's tools: table, overlays and detections."""

import numpy as np
from rich.console import Console
from rich.table import Table

from sam_cache.data import mask_to_rle
from sam_cache.pictures import comparison, draw_overlay
from sam_cache.stages.scoring import Answer

MOST_SHOWN = 24  # objects in one overlay; more hide the image


def print_report(report: dict) -> None:
    """The summary as a table: means over objects, with 95% bootstrap intervals over images."""
    tuned = "tuned" in report
    table = Table(title=f"{report['rows']['which']} rows: {report['rows']['count']} images", title_justify="left")
    for column in ("prompt", "size", "objects"):
        table.add_column(column, justify="right" if column == "objects" else "left")
    names = ["untouched", "tuned"] if tuned else ["untouched"]
    for name in names:
        table.add_column(f"{name} IoU", justify="right")
        table.add_column("Dice", justify="right")
        table.add_column("boundary", justify="right")
    if tuned:
        table.add_column("IoU gain [95%]", justify="right")
    for kind, sizes in report["untouched"].items():
        for size, found in sizes.items():
            cells = [kind if size == "all" else "", size, str(found["objects"])]
            for name in names:
                scores = report[name][kind][size]
                cells += [f"{scores[key]['mean']:.3f}" for key in ("iou", "dice", "boundary_iou")]
            if tuned:
                gain = report["gain"][kind][size]["iou"]
                cells.append(f"{gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]")
            table.add_row(*cells, end_section=size == list(sizes)[-1])
    console = Console(width=None if Console().is_terminal else 120)
    console.print(table)
    if "sets" in report:
        console.print(tabulate_sets(report, names))
    for kind, by_name in report.get("average_precision", {}).items():
        values = ", ".join(f"{name} {ap['AP']:.3f} (AP50 {ap['AP50']:.3f})" for name, ap in by_name.items())
        console.print(f"mask AP, {kind} prompts: {values}", highlight=False)


def tabulate_sets(report: dict, names: list[str]) -> Table:
    """One row per prompt kind and set: the means over its objects; and their mean over sets."""
    table = Table(title="by set, mean IoU and mean boundary IoU at the images' own size", title_justify="left")
    for column in ("prompt", "set", "images"):
        table.add_column(column, justify="right" if column == "images" else "left")
    for name in [*names, *(["gain in"] if "tuned" in names else [])]:
        table.add_column(f"{name} IoU", justify="right")
        table.add_column("boundary", justify="right")
    for kind, means in report["mean_over_sets"]["untouched"].items():
        for place, (which, found) in enumerate(report["sets"].items()):
            cells = [f"{found[name][kind][key]['mean']:.3f}" for name in names for key in means]
            cells += [f"{found['gain'][kind][key]['mean']:+.3f}" for key in means if "gain" in found]
            table.add_row(kind if not place else "", which, str(found["untouched"][kind]["images"]), *cells)
        over_sets = report["mean_over_sets"]
        cells = [f"{over_sets[name][kind][key]:.3f}" for name in names for key in means]
        cells += [f"{over_sets['gain'][kind][key]:+.3f}" for key in means if "gain" in over_sets]
        table.add_row("", "mean over sets", "", *cells, end_section=True)
    return table


def to_detection(answer: Answer, network: str) -> dict:
    """The answer as a COCO detection; a prompted object's category is known."""
    mask = answer.whole(answer.masks[network])
    return {
        "image_id": answer.scores[network].image,
        "category_id": answer.category,
        "segmentation": {"size": list(mask.shape), "counts": mask_to_rle(mask)},
        "score": answer.scores[network].predicted_iou,
    }


def draw_answers(image: np.ndarray, answers: list[Answer]) -> np.ndarray:
    """Prompts, truth and answers on one image, side by side."""
    geometry = answers[0].geometry
    answers = sorted(answers, key=lambda answer: -np.count_nonzero(answer.truth.mask))[:MOST_SHOWN]
    points = np.concatenate([geometry.points_to_image(a.prompt.points_xy_input.numpy()) for a in answers])
    # An answer joined from tiles has several prompts, and not all of these a box.
    boxes = np.concatenate(
        [geometry.boxes_to_image(a.prompt.boxes_xyxy_input[a.prompt.has_box].numpy()) for a in answers]
    )
    prompts = {
        "points_xy_image": points,
        "labels": np.concatenate([a.prompt.labels.numpy() for a in answers]),
        "boxes_xyxy_image": boxes if len(boxes) else None,
    }
    masks = {name: [a.whole(a.masks[name]) for a in answers] for name in answers[0].masks}
    ious = {name: float(np.mean([a.scores[name].iou for a in answers])) for name in masks}
    if len(masks) == 1:
        name, shown = masks.popitem()
        return draw_overlay(image, shown, **prompts, title=f"{name} SAM, IoU {ious[name]:.3f}")
    truth = [a.whole(a.truth) for a in answers]
    return comparison(image, truth, masks, ious=ious, **prompts)
