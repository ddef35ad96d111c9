"""What a network is asked about a folder of images: the boxes of a COCO file, or one mask for each image."""

from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
import numpy as np

from sam_cache.data import Dataset
from sam_cache.data.coco import Id, Side
from sam_cache.errors import DatasetError
from sam_cache.types import ImageRecord

MOST_BOXES = 2**16 - 1  # that a PNG can number


class Image(msgspec.Struct):
    id: Id
    file_name: str
    height: Side = 0
    width: Side = 0


class Box(msgspec.Struct):
    image_id: Id
    category_id: Id
    bbox: tuple[float, float, float, float]
    id: Id | None = None


class BoxFile(msgspec.Struct):
    images: list[Image]
    annotations: list[msgspec.Raw]
    categories: list[dict[str, Any]] = []


@dataclass(frozen=True)
class Question:
    """One image, and the boxes (x, y, w, h) in its pixels to ask about; with None, one mask without any prompt.

    `ids` and `categories` are those of the answers, one a box; without prompt there is one answer.
    """

    record: ImageRecord
    ids: list[int]
    categories: list[int]
    boxes_xywh_image: np.ndarray | None = None


@dataclass(frozen=True)
class Questions:
    """One question an image, the categories as COCO lists them, and what had to be left out."""

    images: list[Question]
    categories: list[dict]
    problems: list[str] = field(default_factory=list)


def ask_without_prompts(dataset: Dataset) -> Questions:
    """One mask for every image, of the only category there is."""
    images = [Question(record, [number], [1]) for number, record in enumerate(dataset.images, start=1)]
    return Questions(images, [{"id": 1, "name": "foreground"}])


def read_boxes(file: Path, dataset: Dataset, folder: Path) -> Questions:
    """The boxes of a COCO file about the images of `dataset`, which lie in `folder`, matched by file name.

    Images keep the ids of the file, boxes and categories too; where boxes have no ids, or share one, all are
    numbered by position, from 1 on. What is no box, or of an image that is not there, is a problem and left
    out. Raises DatasetError where the file cannot be used at all, or knows none of the images.
    """
    contents = _decode(file)
    listed = {record.path for record in dataset.images}
    records: dict[int, ImageRecord] = {}
    problems: list[str] = []
    taken: set[str] = set()
    for image in contents.images:
        name = PurePosixPath(image.file_name).as_posix()  # ./a.png is a.png; a name with .. is never listed
        if image.id in records:
            raise DatasetError(f"{file}: image id {image.id} occurs twice; give each image its own id")
        if name not in listed or name in taken:
            where = f"occurs twice in {file}" if name in taken else f"of {file} is not in {folder}"
            problems.append(f"image {image.file_name!r} {where}; its boxes are left out")
            continue
        taken.add(name)
        records[image.id] = ImageRecord(image.id, name, image.height, image.width)
    if not records:
        raise DatasetError(
            f"{file}: none of its {len(contents.images)} images is in {folder}; file_name is relative to that folder"
        )
    known = {image.id for image in contents.images}
    boxes = _read_boxes(file, contents.annotations, known, problems)
    by_image: dict[int, list[Box]] = {id: [] for id in records}
    for box in boxes:
        if box.image_id in by_image:
            by_image[box.image_id].append(box)
    return Questions(
        [_ask(record, by_image[id], problems) for id, record in records.items()], contents.categories, problems
    )


def _ask(record: ImageRecord, boxes: list[Box], problems: list[str]) -> Question:
    if len(boxes) > MOST_BOXES:
        problems.append(f"{record.path}: only the first {MOST_BOXES} of {len(boxes)} boxes are asked for")
        boxes = boxes[:MOST_BOXES]
    return Question(
        record,
        [box.id for box in boxes],
        [box.category_id for box in boxes],
        np.array([box.bbox for box in boxes], np.float64).reshape(-1, 4),
    )


def _read_boxes(file: Path, annotations: list[msgspec.Raw], known: set[int], problems: list[str]) -> list[Box]:
    """The annotations that are boxes of known images, each with an id of its own."""
    decode = msgspec.json.Decoder(Box, strict=False).decode
    boxes, positions = [], []
    for position, text in enumerate(annotations, start=1):
        try:
            box = decode(text)
        except msgspec.DecodeError as error:
            problems.append(f"{file}: annotation {position}: {error}")
            continue
        if box.image_id not in known:
            problems.append(f"{file}: annotation {position}: no image has the id {box.image_id}")
            continue
        boxes.append(box)
        positions.append(position)
    if len({box.id for box in boxes} - {None}) < len(boxes):
        for box, position in zip(boxes, positions, strict=True):
            box.id = position
    return boxes


def _decode(file: Path) -> BoxFile:
    try:
        return msgspec.json.decode(file.read_bytes(), type=BoxFile, strict=False)
    except OSError as error:
        raise DatasetError(f"--boxes {file}: cannot be read ({error.strerror}); correct the path") from None
    except msgspec.ValidationError as error:
        raise DatasetError(f"--boxes {file}: not a COCO file: {error}; correct that field") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise DatasetError(f"--boxes {file}: broken JSON: {error}; write it again") from None
