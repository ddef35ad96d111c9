"""Objects and answers in COCO's own format, for its scorers."""

import numpy as np


def coco_image(image_id: int, height: int, width: int) -> dict:
    """An image's entry; LVIS wants to know which categories were not looked for, here none."""
    return {
        "id": image_id,
        "height": height,
        "width": width,
        "neg_category_ids": [],
        "not_exhaustive_category_ids": [],
    }


def coco_annotation(
    number: int, image_id: int, category: int, box_xywh: np.ndarray, area: float, iscrowd: bool, rle: bytes,
    size_hw: tuple[int, int],
) -> dict:  # fmt: skip
    """An object's entry; `number` is its id, from 1 on."""
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category,
        "bbox": [float(value) for value in box_xywh],
        "area": float(area),
        "iscrowd": int(iscrowd),
        "segmentation": {"size": list(size_hw), "counts": rle},
    }
