"""A dataset's objects as the flat columns a store keeps, deterministic points included."""

from collections.abc import Callable, Iterable

import numpy as np

from sam_cache.data import Dataset, deterministic_points
from sam_cache.store import Ragged, Table

COLUMNS = {
    "row": np.int64,
    "id": np.int64,
    "category": np.int64,
    "area": np.float64,
    "iscrowd": np.bool_,
    "box_xywh_image": np.float64,
    "centroid_xy_image": np.float64,
    "centroid_moved": np.bool_,
    "bbox_center_xy_image": np.float64,
    "bbox_center_moved": np.bool_,
    "interior_xy_image": np.float64,
}


def object_columns(
    dataset: Dataset, numbered_rows: Iterable[tuple[int, int]], on_image: Callable[[], None] = lambda: None
) -> Table:
    """The objects of (image number, row) pairs, one table row per object.

    Points and boxes are in pixels of the image. The points are computed here, once: a centroid or box
    centre outside its mask has been moved to the nearest pixel inside, and says so.
    """
    columns: dict[str, list] = {name: [] for name in COLUMNS}
    rles: list[bytes] = []
    for number, row in numbered_rows:
        image = dataset.images[number]
        objects = dataset.objects(number)
        if objects and not image.height * image.width:
            dataset.problems.append(f"image {image.id} ({image.path}): has objects but no size; give its record one")
            objects = []
        for found in objects:
            points = deterministic_points(found.rle, image.height, image.width)
            values = (
                row,
                found.id,
                found.category,
                found.area,
                found.iscrowd,
                found.box_xywh_image,
                points.centroid_xy_image,
                points.centroid_moved,
                points.bbox_center_xy_image,
                points.bbox_center_moved,
                points.interior_xy_image,
            )
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
            rles.append(found.rle)
        on_image()
    table: Table = {}
    for name, dtype in COLUMNS.items():
        width = {"box_xywh_image": (4,)}.get(name, (2,) if "_xy_" in name else ())
        table[name] = np.array(columns[name], dtype).reshape(len(rles), *width)
    return table | {"rle": Ragged.from_list(rles)}
