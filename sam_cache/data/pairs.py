"""Several sets of images with one binary mask each, in one dataset that keeps their names, as HQSeg-44K is."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np

from sam_cache.data.dataset import Dataset
from sam_cache.data.mask_files import count_sample, look, read_mask, read_size
from sam_cache.data.pairing import check_pattern, has_many_files, pair_folders
from sam_cache.data.paths import name_to_id, read_inside
from sam_cache.data.rle import mask_to_rle, measure_rle
from sam_cache.errors import DatasetError, UsageError
from sam_cache.types import ImageRecord, ObjectRecord

SYNTAX = "NAME=IMAGES:MASKS, such as DIS5K-TR=DIS5K/DIS-TR/im:DIS5K/DIS-TR/gt"
TRAIN, VAL = "train", "val"
# Above half of 255. HQ-SAM's code compares with > 128 (train/utils/misc.py): the value 128 alone differs.
THRESHOLD = 127


@dataclass(frozen=True)
class Pair:
    """A set called `name`: a folder of images with a folder of masks. `part` is `train` or `val`."""

    name: str
    images: Path
    masks: Path
    part: str = TRAIN

    @property
    def split(self) -> str:
        return f"{self.part}/{self.name}"


def parse_pair(text: str, part: str, root: Path | None = None) -> Pair:
    """Read `NAME=IMAGES:MASKS`; relative folders lie under `root` where one is given. Raises UsageError."""
    flag = "--pairs" if part == TRAIN else "--val-pairs"
    name, equals, folders = text.partition("=")
    images, *masks = folders.split(":")
    if not (equals and images and len(masks) == 1 and masks[0]):
        raise UsageError(f"{flag} {text!r}: write {SYNTAX}")
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
        raise UsageError(f"{flag} {text!r}: a set's name {name!r} may hold letters, digits, '-', '_' and '.' only")
    under = root or Path()
    return Pair(name, under / images, under / masks[0], part)


def open_pairs(
    pairs: Sequence[Pair], limit: int | None = None, mask_maximum: int = 255, pattern: str = "{stem}.*"
) -> Dataset:
    """The images of all `pairs`, each with one object: category 1, `foreground`.

    The sets take turns: the first image of each, then the second of each, and so on while they last. So a
    `limit` keeps some of every set, unless there are more sets than that, and a store made with one can grow
    with a larger one or none.

    Image and mask are matched by name (see `pair_masks` for the pattern), also where they share a folder.
    `ImageRecord.split` is `train/NAME` or `val/NAME`, and `path` is relative to that set's image folder. An
    image's id depends on its set's name and its path alone.

    Masks are 8-bit grey from 0 to `mask_maximum`, 255 or 1, with any levels between: the object is what
    lies above half. One-bit masks fit both. A mask whose values are 0 and 1 among those of 0 and 255 has no
    object and is reported.

    Raises UsageError where there is no pair or a name comes twice, DatasetError where a set's folders cannot
    be used at all: none of its masks has an object, or they go up to 1 where 255 is said, or the other way.
    """
    if not pairs:
        raise UsageError(f"--dataset pairs: no pairs given; say --pairs {SYNTAX}")
    names = [pair.name for pair in pairs]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UsageError(f"--pairs {twice[0]}=...: that name is given twice; every set needs one of its own")
    check_pattern(pattern)
    if has_many_files(pattern):
        raise UsageError(f"--mask-pattern {pattern!r}: --dataset pairs has one mask per image; leave out the *")

    found = [pair_folders(pair.images, pair.masks, pattern) for pair in pairs]
    sets = [
        [(pair, image, group) for image, group in paired.items()]
        for pair, (paired, _) in zip(pairs, found, strict=True)
    ]
    kept = [entry for turn in zip_longest(*sets) for entry in turn if entry is not None][:limit]
    notes = []
    for pair, (_, lonely) in zip(pairs, found, strict=True):
        masks = [group[0] for owner, _, group in kept if owner is pair]
        if not masks:
            continue
        _check_masks(pair, masks, mask_maximum)
        notes.append(f"{pair.split}: {len(masks)} images ({count_sample(masks)} masks)")
        notes += [f"{pair.split}: {note}" for note in lonely]
    problems = [
        f"{pair.name}/{image}: {len(group)} masks match, only {group[0]} is used; give a narrower --mask-pattern"
        for pair, image, group in kept
        if len(group) > 1
    ]
    files = [(pair, group[0]) for pair, _, group in kept]
    records = [
        ImageRecord(name_to_id(f"{pair.name}/{image}"), image, *read_size(pair.masks, group[0]), pair.split)
        for pair, image, group in kept
    ]
    folders = {pair.split: pair.images for pair in pairs}

    def convert(number: int) -> tuple[list[ObjectRecord], list[str]]:
        (pair, file), record = files[number], records[number]
        try:
            region = _find_object(_read(pair, file, mask_maximum), mask_maximum)
        except DatasetError as error:
            return [], [f"mask {pair.name}/{file}: {error}"]
        rle = mask_to_rle(region)
        box, area = measure_rle(rle, *region.shape)
        return [ObjectRecord(record.id, 1, rle, box, area)], []

    return Dataset(
        records,
        {1: "foreground"},
        lambda record: read_inside(folders[record.split], record.path),
        convert,
        notes=notes,
        problems=problems,
    )


def _read(pair: Pair, file: str, maximum: int) -> np.ndarray:
    """Values (H, W) uint8 of a mask; one bit counts as 0 and `maximum`."""
    values = read_mask(pair.masks, file, shown=maximum == 255, remedy=f"save masks as 8-bit grey, 0 to {maximum}")
    if values.dtype == bool:
        return values * np.uint8(maximum)
    if values.dtype != np.uint8:
        raise DatasetError(f"holds {values.dtype}; save masks as 8-bit grey, 0 to {maximum}")
    return values


def _find_object(values: np.ndarray, maximum: int) -> np.ndarray:
    highest = int(values.max(initial=0))
    if highest == 0:
        raise DatasetError("is empty")
    if maximum == 1 < highest:
        raise DatasetError(f"values up to {highest} where --mask-maximum is 1; divide it by {highest}")
    if highest == 1 < maximum:
        raise DatasetError(
            "values 0 and 1 where 0 and 255 are meant; multiply it by 255, or say --mask-maximum 1 if all are meant so"
        )
    region = values > THRESHOLD if maximum == 255 else values > 0
    if not region.any():
        raise DatasetError(f"is empty: no value is above {THRESHOLD}, the highest is {highest}")
    return region


def _check_masks(pair: Pair, masks: Sequence[str], maximum: int) -> None:
    """Raises DatasetError where a look at the set's masks shows no object, or that they have another maximum."""
    first: dict[int, str] = {}  # a file for each highest value

    def tells(mask: np.ndarray) -> bool:
        return mask.max(initial=0) == 1 or mask.max(initial=0) > THRESHOLD

    for file, mask in look(pair.masks, masks, lambda file: _read(pair, file, maximum), tells):
        first.setdefault(int(mask.max(initial=0)), file)
    highest = max(first, default=0)
    if maximum == 255 and highest == 1:
        raise DatasetError(
            f"{pair.masks}: masks such as {first[1]} have the values 0 and 1, not 0 and 255; "
            "say --mask-maximum 1 where they are meant so, or multiply them by 255"
        )
    if maximum == 1 < highest and 1 not in first:
        raise DatasetError(
            f"{pair.masks}: masks such as {first[highest]} have values up to {highest}, not 0 and 1; "
            "leave out --mask-maximum 1"
        )
