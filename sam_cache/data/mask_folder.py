"""A folder of images with a folder of masks.

Three kinds of mask are understood, and told apart by looking at a sample of the files:

- binary: 0 is background and 1 or 255 the object, also as 1-bit PNG or grey RGB; one object per image;
- class index: each value, or palette entry, is a class; one object per class, or per connected part;
- one binary file per object, where the pattern's file name has a `*`.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

import cv2
import numpy as np

from sam_cache.data.dataset import Dataset
from sam_cache.data.mask_files import count_sample, look, read_mask, read_size, shorten, values_of
from sam_cache.data.pairing import has_many_files, pair_folders
from sam_cache.data.paths import name_to_id, read_inside
from sam_cache.data.rle import mask_to_rle, measure_rle
from sam_cache.errors import DatasetError, UsageError
from sam_cache.types import ImageRecord, ObjectRecord

VOID = frozenset({0, 255})  # background, and what VOC, ADE20K and Cityscapes call void


def open_masks(
    images: Path,
    masks: Path,
    pattern: str = "{stem}.*",
    objects_per: str = "class",
    ignore_values: Collection[int] | None = None,
    limit: int | None = None,
    classes: Collection[int] | None = None,
) -> Dataset:
    """Pair the files below `images` with masks below `masks`; see `pair_masks` for the pattern.

    `objects_per` is `class`, or `component` for one object per 8-connected part of each class.
    `ignore_values` are the mask values that are no object: unless given, 0 and 255 where they are no
    class. `classes` are the values that are one; a mask with any other value is reported and has no
    objects. Giving either also says that the masks are class indices, whatever they look like.

    Images without a mask and masks without an image are left out and listed in `notes`. `categories`
    are the `classes`; without these they grow as `objects` meets values.

    Raises DatasetError where the folders cannot be used at all, UsageError where `classes` and
    `ignore_values` share a value.
    """
    declared = None if classes is None else frozenset(classes)
    void = VOID - (declared or frozenset()) if ignore_values is None else frozenset(ignore_values)
    if declared and declared & void:
        raise UsageError(f"mask values {shorten(declared & void)}: both --classes and --ignore-values; take one out")
    paired, notes = pair_folders(images, masks, pattern)
    names = list(paired)[:limit]
    many = has_many_files(pattern)
    kept = [paired[name] if many else paired[name][:1] for name in names]
    problems = [
        f"{name}: {len(paired[name])} masks match, only {paired[name][0]} is used; give a narrower --mask-pattern"
        for name in names
        if not many and len(paired[name]) > 1
    ]

    foreground, notes[:0] = _recognise(
        masks, kept, many, void, indices=not (ignore_values is None and declared is None)
    )
    categories = {1: "object"} if foreground else {value: str(value) for value in sorted(declared or ())}
    records = [
        ImageRecord(name_to_id(name), name, *read_size(masks, files[0]))
        for name, files in zip(names, kept, strict=True)
    ]

    def convert(number: int) -> tuple[list[ObjectRecord], list[str]]:
        record, objects, wrong = records[number], [], []
        for file in kept[number]:
            try:
                mask = _read_mask(masks, file)
                if mask.shape != (record.height, record.width):
                    raise DatasetError(
                        f"size {mask.shape[1]}x{mask.shape[0]} differs from {record.width}x{record.height}"
                    )
                found = _split_values(mask, foreground, void, declared)
            except DatasetError as error:
                wrong.append(f"mask {file}: {error}")
                continue
            if not found:
                wrong.append(f"mask {file}: is empty")
            for category, region in found:
                categories.setdefault(category, str(category))
                for part in _split_parts(region) if objects_per == "component" else [region]:
                    rle = mask_to_rle(part)
                    box, area = measure_rle(rle, *part.shape)
                    objects.append(ObjectRecord(number << 20 | len(objects), category, rle, box, area))
        return objects, wrong

    return Dataset(
        records, categories, lambda record: read_inside(images, record.path), convert, notes=notes, problems=problems
    )


def _recognise(
    masks: Path, files: Sequence[Sequence[str]], many: bool, void: frozenset[int], indices: bool
) -> tuple[int, list[str]]:
    """The value that is foreground in binary masks, 0 for class indices; and a note that says so.

    `indices` says that they are class indices, so that no look decides it; `void` are the values that
    are no object in these.
    """
    if many and indices:
        raise DatasetError(
            f"{masks}: masks of one file per object are binary, not class indices; "
            "leave out --classes and --ignore-values, or the * of --mask-pattern"
        )
    every = [file for group in files for file in group]
    background = void if indices else {0}
    values: set[int] = set()
    for file, mask in look(
        masks, every, lambda file: _read_mask(masks, file), lambda mask: not values_of(mask) <= background
    ):
        values.update(values_of(mask))
        if _is_nearly_binary(mask):
            raise DatasetError(
                f"{masks / file}: grey levels near 0 and 255, neither binary nor class index (saved as JPEG?); "
                "threshold the masks at 128 and save them as PNG"
            )
    what = count_sample(every)
    if not indices and values <= {0, 255} and 255 in values:
        return 255, [f"masks are binary 0/255 ({what})"]
    if not indices and values <= {0, 1}:
        return 1, [f"masks are binary 0/1 ({what})"]
    if many:
        raise DatasetError(
            f"{masks}: masks of one file per object must be 0/1 or 0/255, but values are {shorten(values)}; "
            "save them as binary masks"
        )
    return 0, [f"masks are class indices ({what}, values {shorten(values)})"]


def _is_nearly_binary(mask: np.ndarray) -> bool:
    """Binary once, then compressed or resized: many levels, and nearly all pixels within 15 of 0 or 255."""
    if mask.dtype != np.uint8:
        return False
    counts = np.bincount(mask.ravel(), minlength=256)
    near = counts[:16].sum() + counts[240:].sum()
    return np.count_nonzero(counts) > 8 and counts[240:255].any() and near > 0.9 * mask.size


def _read_mask(masks: Path, file: str) -> np.ndarray:
    values = read_mask(masks, file)
    return values.astype(np.uint8) if values.dtype == bool else values


def _split_values(
    mask: np.ndarray, foreground: int, void: frozenset[int], declared: frozenset[int] | None
) -> list[tuple[int, np.ndarray]]:
    """(category, region) for each object value in the mask."""
    values = values_of(mask)
    if foreground:
        if not values <= {0, foreground}:
            raise DatasetError(
                f"values {shorten(values)}, where other masks have only 0 and {foreground}; "
                "if they are class indices, give --classes or --ignore-values"
            )
        return [(1, mask == foreground)] if foreground in values else []
    if declared is not None and not values <= declared | void:
        raise DatasetError(
            f"holds {shorten(values - declared - void)}, neither a declared class nor ignored; "
            "add it to --classes or --ignore-values, or correct the mask"
        )
    return [(value, mask == value) for value in sorted(values - void)]


def _split_parts(region: np.ndarray) -> list[np.ndarray]:
    count, labels = cv2.connectedComponents(region.astype(np.uint8), connectivity=8)
    return [labels == label for label in range(1, count)]
