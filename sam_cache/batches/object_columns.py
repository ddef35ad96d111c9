"""A dataset's objects as the flat columns a store keeps, deterministic points included."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from sam_cache.data import WHOLE, Dataset, View, deterministic_points, measure_rle
from sam_cache.store import Ragged, Table
from sam_cache.types import ImageRecord, ObjectRecord

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


@dataclass
class ViewCount:
    """Of all rows of one kind of view: the objects in them, those among them that are cut off, and those left out."""

    rows: int = 0
    objects: int = 0
    clipped: int = 0
    dropped: int = 0


def object_columns(
    dataset: Dataset,
    numbered_rows: Iterable[tuple[int, int]],
    on_row: Callable[[], None] = lambda: None,
    view_of: Callable[[int], View] = lambda row: WHOLE,
    counts: dict[str, ViewCount] | None = None,
) -> Table:
    """The objects of (image number, row) pairs, one table row per object.

    `view_of(row)` is what a row shows of its image: masks, points and boxes are in pixels of that view, and
    objects that are not in it are left out. Views of one image follow one another; `counts` gathers, by kind,
    what became of their objects. The points are computed here, once: a centroid or box centre outside its
    mask has been moved to the nearest pixel inside, and says so.
    """
    columns: dict[str, list] = {name: [] for name in COLUMNS}
    rles: list[bytes] = []
    counts = {} if counts is None else counts
    last, objects = None, []
    for number, row in numbered_rows:
        if number != last:  # the views of an image share its masks
            last, objects = number, _objects_of(dataset, number)
        view = view_of(row)
        record = view.record(dataset.images[number])
        count = counts.setdefault(view.kind, ViewCount())
        count.rows += 1
        for found in _in_view(objects, view, record, count):
            points = deterministic_points(found.rle, record.height, record.width)
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
        on_row()
    table: Table = {}
    for name, dtype in COLUMNS.items():
        width = {"box_xywh_image": (4,)}.get(name, (2,) if "_xy_" in name else ())
        table[name] = np.array(columns[name], dtype).reshape(len(rles), *width)
    return table | {"rle": Ragged.from_list(rles)}


def _objects_of(dataset: Dataset, number: int) -> list[ObjectRecord]:
    image, objects = dataset.images[number], dataset.objects(number)
    if objects and not image.height * image.width:
        dataset.problems.append(f"image {image.id} ({image.path}): has objects but no size; give its record one")
        return []
    return objects


def _in_view(objects: list[ObjectRecord], view: View, record: ImageRecord, count: ViewCount) -> Iterator[ObjectRecord]:
    """The objects as `view`, whose record is given, has them."""
    for found in objects:
        rle = view.carry(found.rle)
        if rle is None:
            count.dropped += 1
            continue
        count.objects += 1
        if view.kind == "identity":
            yield found
            continue
        count.clipped += view.cuts(found.box_xywh_image)
        box, area = measure_rle(rle, record.height, record.width)
        yield replace(found, rle=rle, box_xywh_image=box, area=area)
