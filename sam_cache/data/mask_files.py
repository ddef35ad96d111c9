"""Reading the files of a mask folder, and looking at a sample of them."""

import io
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sam_cache.data.decode import FORMATS
from sam_cache.data.paths import read_inside, resolve_inside
from sam_cache.errors import DatasetError

SAMPLE = 64  # masks looked at, evenly spaced, to tell what kind they are


def read_mask(
    folder: Path, file: str, *, shown: bool = False, remedy: str = "save class indices as grey or palette PNG"
) -> np.ndarray:
    """The values (H, W) of a mask file, bool where it has one bit a pixel, else integers.

    Of a palette picture the entries' numbers, or with `shown` the colours they stand for. Of several
    channels the first, where the colours are grey. Raises DatasetError, which names `remedy` where the
    file holds no such values, and ImageError where it cannot be read.
    """
    data = read_inside(folder, file)
    try:
        # Pillow, because OpenCV turns palette entries into colours.
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            values = np.asarray(image.convert("RGB") if shown and image.mode in ("P", "PA") else image)
    except Exception as error:
        raise DatasetError(f"damaged or not an image ({error})") from None
    if values.ndim == 3:
        grey = values[:, :, 0]
        if values.shape[2] >= 3 and not (values[:, :, :3] == grey[:, :, None]).all():
            raise DatasetError(f"is a colour picture; {remedy}")
        values = grey
    if values.dtype != bool and not np.issubdtype(values.dtype, np.integer):
        raise DatasetError(f"holds {values.dtype}; {remedy}")
    return values


def read_size(folder: Path, file: str) -> tuple[int, int]:
    """Height and width as the file's header has them; 0, 0 where that cannot be read."""
    try:
        with Image.open(resolve_inside(folder, file), formats=FORMATS) as header:
            return header.size[::-1]
    except Exception:  # as many kinds as Pillow has formats; the mask is reported when its objects are asked for
        return 0, 0


def look(
    folder: Path, files: Sequence[str], read: Callable[[str], np.ndarray], tells: Callable[[np.ndarray], bool]
) -> Iterator[tuple[str, np.ndarray]]:
    """A sample of the files and their masks; after those the others, until there is one that `tells` something.

    Files that cannot be read are passed over: they are reported when their objects are asked for. Raises
    DatasetError where masks can be read and none tells.
    """
    sample = np.unique(np.linspace(0, len(files) - 1, SAMPLE).astype(int)).tolist()
    others = sorted(set(range(len(files))) - set(sample))
    readable, told, highest = 0, False, 0
    for place, number in enumerate(sample + others):
        if told and place >= len(sample):
            return
        try:
            mask = read(files[number])
        except DatasetError:
            continue
        readable += 1
        highest = max(highest, int(mask.max(initial=0)))
        told = told or tells(mask)
        yield files[number], mask
    if readable and not told:
        raise DatasetError(
            f"{folder}: none of its {readable} masks has an object, the highest value is {highest}; "
            "check that these are the masks, and how they were saved"
        )


def count_sample(files: Sequence[str]) -> str:
    return f"looked at {min(len(files), SAMPLE)} of {len(files)}"


def values_of(mask: np.ndarray) -> set[int]:
    values = np.unique(mask) if mask.dtype.itemsize > 2 else np.flatnonzero(np.bincount(mask.ravel()))
    return set(values.tolist())


def shorten(values: Collection[int]) -> str:
    first = sorted(values)[:8]
    return ", ".join(map(str, first)) + (", ..." if len(values) > len(first) else "")
