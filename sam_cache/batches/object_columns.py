"""A dataset's objects as the flat columns a store keeps, deterministic points included."""

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import groupby
from operator import itemgetter

import numpy as np

from sam_cache.data import WHOLE, Dataset, View, crop_rle, deterministic_points, measure_rle
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
TYPECODES = {np.int64: "q", np.float64: "d", np.bool_: "b"}  # of `array`, for lists take five times the table's room


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
    columns = {name: array(TYPECODES[dtype]) for name, dtype in COLUMNS.items()}
    text, ends = bytearray(), array("q", [0])
    counts = {} if counts is None else counts
    for number, pairs in groupby(numbered_rows, key=itemgetter(0)):
        image, rows = dataset.images[number], [row for _, row in pairs]
        views, objects = [view_of(row) for row in rows], _objects_of(dataset, number)
        carried = [_carry(found, image, views) for found in objects]
        for place, (row, view) in enumerate(zip(rows, views, strict=True)):
            record, count = view.record(image), counts.setdefault(view.kind, ViewCount())
            count.rows += 1
            for whole, rles in zip(objects, carried, strict=True):
                if (found := _in_view(whole, rles[place], view, record, count)) is None:
                    continue
                points = deterministic_points(found.rle, record.height, record.width)
                values = (
                    (row,),
                    (found.id,),
                    (found.category,),
                    (found.area,),
                    (found.iscrowd,),
                    found.box_xywh_image,
                    points.centroid_xy_image,
                    (points.centroid_moved,),
                    points.bbox_center_xy_image,
                    (points.bbox_center_moved,),
                    points.interior_xy_image,
                )
                for column, value in zip(columns.values(), values, strict=True):
                    column.extend(value)
                text += found.rle
                ends.append(len(text))
            on_row()
    table: Table = {}
    for name, dtype in COLUMNS.items():
        width = {"box_xywh_image": (4,)}.get(name, (2,) if "_xy_" in name else ())
        table[name] = np.frombuffer(columns[name], dtype).reshape(len(ends) - 1, *width)
    return table | {"rle": Ragged(np.frombuffer(text, np.uint8), np.frombuffer(ends, np.int64))}


def _objects_of(dataset: Dataset, number: int) -> list[ObjectRecord]:
    image, objects = dataset.images[number], dataset.objects(number)
    if objects and not image.height * image.width:
        dataset.problems.append(f"image {image.id} ({image.path}): has objects but no size; give its record one")
        return []
    return objects


def _carry(found: ObjectRecord, image: ImageRecord, views: list[View]) -> list[bytes | None]:
    """The mask of one object in each view of its image; it is decoded once for all of them, if at all."""
    crop = cache(partial(crop_rle, found.rle, image.height, image.width))
    return [view.carry(found.rle, found.box_xywh_image, crop) for view in views]


def _in_view(
    found: ObjectRecord, rle: bytes | None, view: View, record: ImageRecord, count: ViewCount
) -> ObjectRecord | None:
    """The object as `view`, whose record is given, has it: with the mask `rle`, or not at all."""
    if rle is None:
        count.dropped += 1
        return None
    count.objects += 1
    if view.kind == "identity":
        return found
    count.clipped += view.cuts(found.box_xywh_image)
    box, area = measure_rle(rle, record.height, record.width)
    return replace(found, rle=rle, box_xywh_image=box, area=area)
