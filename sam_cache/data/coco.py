"""COCO instance annotations: one JSON file and a folder of images.

The file is decoded from its mapped pages, where each annotation stays, as text, until the objects of
its image are asked for. So one bad annotation costs only itself, and 1.3 million of them (LVIS) take
little more memory than the file.
"""

import mmap
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from sam_cache.data.dataset import Dataset
from sam_cache.data.decode import PIXEL_LIMIT
from sam_cache.data.paths import holds_file, read_inside
from sam_cache.data.rle import measure_rle, segmentation_to_rle
from sam_cache.errors import DatasetError
from sam_cache.types import ImageRecord, ObjectRecord

Id = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Side = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]


# None of these can be part of a reference cycle, so the garbage collector need not visit them.
class Image(msgspec.Struct, gc=False):
    id: Id
    height: Side
    width: Side
    file_name: str = ""
    coco_url: str | None = None


class Category(msgspec.Struct, gc=False):
    id: Id
    name: str | int | float | None = None
    frequency: str | None = None


class AnnotationFile(msgspec.Struct):
    images: list[Image]
    annotations: list[msgspec.Raw]
    categories: list[Category]


class Owner(msgspec.Struct, gc=False):
    """What an annotation must have to be found again."""

    image_id: Id
    id: Id = 0


class Kind(msgspec.Struct, gc=False):
    """What tells an object's category without its mask."""

    category_id: Id
    iscrowd: bool | int = False


class Annotation(msgspec.Struct, gc=False):
    category_id: Id
    segmentation: msgspec.Raw = msgspec.Raw(b"null")
    area: float | None = None
    iscrowd: bool | int = False


# strict=False takes "17" and 480.0 for integers, which real files contain.
decode_owner = msgspec.json.Decoder(Owner, strict=False).decode
decode_kind = msgspec.json.Decoder(Kind, strict=False).decode
decode_annotation = msgspec.json.Decoder(Annotation, strict=False).decode


def open_coco(
    root: Path | None, split: str | None, images: Path | None, annotations: Path | None, limit: int | None
) -> Dataset:
    """COCO annotations: `annotations` with the folder `images`, or the standard layout under `root`.

    The standard layout is `annotations/instances_{split}.json` with the images in `{split}/` or
    `images/{split}/`; `split` is train2017 unless given. A `file_name` is relative to the image
    folder or to an `images/` folder in it.
    """
    split = split or "train2017"
    if annotations is None:
        if root is None:
            raise DatasetError("no annotations given: --annotations FILE with --images DIR, or --root DIR")
        annotations = root / "annotations" / f"instances_{split}.json"
        if not annotations.is_file():
            raise DatasetError(
                f"{annotations}: no such file; get the 2017 images and annotations from "
                f"https://cocodataset.org/#download and unpack them in {root}, or give --annotations and --images"
            )
        notes = [f"split {split}"]
    else:
        notes = []
    if images is not None:
        folders = [images, images / "images"]
    elif root is not None:
        folders = [root / split, root / "images" / split, root / "images", root]
    else:
        raise DatasetError(f"{annotations}: the image folder is missing; give --images DIR")
    contents = read_annotations(annotations)
    names = [image.file_name for image in contents.images]
    folder = choose_folder(folders, names)
    return dataset_of(annotations, contents, folder, names, limit, notes)


def open_annotations(file: Path) -> Dataset:
    """The objects of a COCO or LVIS file by themselves; reading an image of this dataset fails."""
    contents = read_annotations(file)
    return dataset_of(file, contents, file.parent, [image.file_name for image in contents.images], None, [])


def read_annotations(file: Path) -> AnnotationFile:
    """Decode an annotation file. Raises DatasetError that names the byte or the field that is wrong."""
    try:
        with file.open("rb") as stream:
            contents = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise DatasetError(f"{file}: cannot be read ({error})") from None
    try:
        return msgspec.json.decode(contents, type=AnnotationFile, strict=False)
    except msgspec.ValidationError as error:
        raise DatasetError(f"{file}: not COCO instance annotations: {error}; correct that field") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise DatasetError(
            f"{file}: broken JSON: {error}, of {len(contents)} bytes; download or export it again"
        ) from None


def choose_folder(folders: Sequence[Path], names: Sequence[str]) -> Path:
    """The first of `folders` that holds one of the first images, else the first that exists."""
    there = [folder for folder in folders if folder.is_dir()]
    if not there:
        raise DatasetError(f"{folders[0]}: no such folder; give the folder of the images with --images DIR")
    return next((folder for folder in there if any(holds_file(folder, name) for name in names[:32])), there[0])


def dataset_of(
    file: Path,
    contents: AnnotationFile,
    folder: Path,
    names: Sequence[str],
    limit: int | None,
    notes: list[str],
) -> Dataset:
    """Join decoded annotations with the images called `names` in `folder`."""
    images = [
        ImageRecord(image.id, name, image.height, image.width)
        for image, name in zip(contents.images[:limit], names, strict=False)
    ]
    categories = {category.id: str(category.name) for category in contents.categories}
    image_ids = np.fromiter((image.id for image in contents.images), np.int64, len(contents.images))
    grouped = np.sort(image_ids)
    twice = np.flatnonzero(np.diff(grouped) == 0)
    if len(twice):
        raise DatasetError(f"{file}: image id {grouped[twice[0]]} occurs twice; give each image its own id")

    positions, ids, owners, problems = _read_owners(file, contents.annotations)
    grouping = np.argsort(owners, kind="stable")
    positions, ids, owners = positions[grouping], ids[grouping], owners[grouping]
    starts, stops = np.searchsorted(owners, image_ids, "left"), np.searchsorted(owners, image_ids, "right")
    strays = np.flatnonzero(~np.isin(owners, image_ids))
    if len(strays):
        problems.append(
            f"{file}: {len(strays)} annotations are of images that are not listed "
            f"(for example annotation {ids[strays[0]]}, of image {owners[strays[0]]})"
        )

    def convert(number: int) -> tuple[list[ObjectRecord], list[str]]:
        image, objects, wrong = images[number], [], []
        of_image = slice(starts[number], stops[number])
        for position, id in zip(positions[of_image].tolist(), ids[of_image].tolist(), strict=True):
            try:
                objects.append(_object_of(contents.annotations[position], id, image, categories))
            except (DatasetError, msgspec.DecodeError) as error:
                wrong.append(f"image {image.id} ({image.path}), annotation {id}: {error}")
        return objects, wrong

    def tell_categories(number: int) -> list[int]:
        found = []
        for position in positions[starts[number] : stops[number]].tolist():
            with suppress(msgspec.DecodeError):  # `convert` says what is wrong with it
                found.append(decode_kind(contents.annotations[position]))
        return [kind.category_id for kind in found if not kind.iscrowd and kind.category_id in categories]

    frequencies = {category.id: category.frequency for category in contents.categories if category.frequency}
    return Dataset(
        images,
        categories,
        lambda record: read_inside(folder, record.path),
        convert,
        frequencies,
        tell_categories,
        notes,
        problems,
    )


def _read_owners(file: Path, annotations: list[msgspec.Raw]) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Position in the file, id and image id of each annotation that has them; and what was wrong."""
    ids, owners = np.zeros((2, len(annotations)), np.int64)
    readable = np.ones(len(annotations), bool)
    problems = []
    for position, text in enumerate(annotations):
        try:
            owner = decode_owner(text)
            ids[position], owners[position] = owner.id, owner.image_id
        except msgspec.DecodeError as error:
            readable[position] = False
            problems.append(f"{file}: annotation at position {position}: {error}")
    positions, ids, owners = np.flatnonzero(readable), ids[readable], owners[readable]
    repeated = int((np.diff(np.sort(ids)) == 0).sum())  # np.unique hashes, ten times as long
    if repeated:
        problems.append(f"{file}: {repeated} annotation ids occur before; objects are numbered by position")
        ids = positions + 1
    return positions, ids, owners, problems


def _object_of(text: msgspec.Raw, id: int, image: ImageRecord, categories: dict[int, str]) -> ObjectRecord:
    annotation = decode_annotation(text)
    if annotation.category_id not in categories:
        raise DatasetError(f"unknown category {annotation.category_id}")
    if not 0 < image.height * image.width <= PIXEL_LIMIT:
        raise DatasetError(f"image size {image.width}x{image.height} cannot be")
    rle = segmentation_to_rle(annotation.segmentation, image.height, image.width)
    box, area = measure_rle(rle, image.height, image.width)
    if annotation.area is not None and annotation.area > 0:
        area = annotation.area  # COCO's and LVIS's size buckets go by the area in the file, that of the polygon
    return ObjectRecord(id, annotation.category_id, rle, box, area, bool(annotation.iscrowd))
