"""COCO's run-length masks: made from what annotation files hold, and from arrays.

Runs count pixels column by column, background first. The compressed text writes each run as the
difference to the run two before it, five bits per character (`rleToString` in cocoapi's maskApi.c).
pycocotools reads such text without any check, and allocates whatever a polygon asks for; files come
from strangers, so everything is checked here before it gets there.
"""

from collections.abc import Sequence

import msgspec
import numpy as np
from pycocotools import mask as coco_mask

from sam_cache.errors import DatasetError

# pycocotools keeps every step along an outline in memory, and counts them in 32 bits.
LONGEST = 2**20  # pixels along x and y together; nobody draws that
FARTHEST = 2**24  # pixels from the origin
SIX_CHARACTERS = 2**24  # of four numbers or more that all take six, pycocotools writes one byte beyond its memory


class RunLengths(msgspec.Struct):
    """`{"size": [height, width], "counts": text or list of runs}`, as JSON has it."""

    size: tuple[int, int]
    counts: str | list[int]


def segmentation_to_rle(segmentation: bytes | msgspec.Raw, height: int, width: int) -> bytes:
    """Compressed run lengths of one annotation's `segmentation`, given as JSON text.

    Accepts a list of polygons, one flat polygon (some writers forget the outer list), and
    compressed or plain run lengths. The image is `height` x `width` pixels.

    Raises DatasetError, with a phrase that says why, where there is no mask in it: another image
    size, runs that do not add up, coordinates that are no numbers, nothing inside the image.
    """
    text = bytes(segmentation).lstrip()
    try:
        if text.startswith(b"{"):
            rle = _from_runs(msgspec.json.decode(text, type=RunLengths), height, width)
        else:
            rle = _from_polygons(_decode_polygons(text), height, width)
    except (msgspec.DecodeError, RecursionError) as error:
        raise DatasetError(f"segmentation is neither polygons nor run lengths ({error})") from None
    if not coco_mask.area({"size": [height, width], "counts": rle}):
        raise DatasetError("covers no pixel of the image")
    return rle


def mask_to_rle(mask: np.ndarray) -> bytes:
    """Compressed run lengths of a mask (H, W), bool or 0/1."""
    return coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"]


def rle_to_mask(rle: bytes, height: int, width: int) -> np.ndarray:
    """The mask (H, W), uint8 0/1, of run lengths that this module made."""
    runs = parse_rle(rle)
    values = (np.arange(len(runs)) % 2).astype(np.uint8)
    return np.ascontiguousarray(values.repeat(runs).reshape(width, height).T)


def measure_rle(rle: bytes, height: int, width: int) -> tuple[tuple[float, float, float, float], float]:
    """The tight box (x, y, w, h) and the area of a mask, both in pixels of the image."""
    coded = {"size": [height, width], "counts": rle}
    x, y, w, h = coco_mask.toBbox(coded).tolist()
    return (x, y, w, h), float(coco_mask.area(coded))


def parse_rle(text: bytes) -> np.ndarray:
    """The runs, int64, that compressed text stands for. Raises DatasetError where it is no such text."""
    numbers, _ = read_numbers([text])
    runs = numbers[:-1]
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def read_numbers(rles: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The numbers written in the texts, int64 and one more at the end, and where those of each text end.

    Texts are read together: what one costs is the calls and not the characters. Raises DatasetError where one
    is no such text.
    """
    codes = np.frombuffer(b"".join(rles), np.uint8) - np.uint8(48)
    ends = np.flatnonzero(codes < 0x20)  # bit 5 says that the number goes on
    sizes = np.array([len(rle) for rle in rles], np.int64)
    last = sizes.cumsum() - 1
    if not len(rles):
        return np.zeros(1, np.int64), sizes
    if not sizes.all() or codes.max() > 63 or codes[last].max() > 0x1F:
        raise DatasetError("run-length text is damaged")
    digits = codes & 0x1F
    numbers = np.empty(len(ends) + 1, np.int64)
    numbers[-1] = 0
    values = numbers[:-1]
    values[:] = digits[ends]
    values -= (values & 0x10) << 1  # bit 4 is the sign
    more = np.diff(ends, prepend=-1) - 1
    longest = int(more.max())
    if longest > 6:  # 35 bits, more than any run that fits an image
        raise DatasetError("run-length text is damaged")
    for digit in range(1, longest + 1):
        longer = np.flatnonzero(more >= digit)
        values[longer] = values[longer] << 5 | digits[ends[longer] - digit]
    return numbers, ends.searchsorted(last) + 1


def _from_runs(run_lengths: RunLengths, height: int, width: int) -> bytes:
    if run_lengths.size != (height, width):
        h, w = run_lengths.size
        raise DatasetError(f"mask of {w}x{h} in an image of {width}x{height}")
    counts = run_lengths.counts
    try:
        text = counts.encode("ascii") if isinstance(counts, str) else b""
        runs = parse_rle(text) if isinstance(counts, str) else np.array(counts, dtype=np.int64)
    except (UnicodeEncodeError, OverflowError):
        raise DatasetError("run-length text is damaged") from None
    if not len(runs) or runs.min() < 0 or runs.max() > height * width or runs.sum() != height * width:
        raise DatasetError(f"runs do not add up to {width}x{height} pixels")
    if text and runs[1:].all():
        return text
    joined = _join_runs(runs)
    written = joined.copy()
    written[3:] -= joined[1:-2]
    if len(written) > 3 and np.abs(written).min() >= SIX_CHARACTERS:
        raise DatasetError(f"runs are all of {SIX_CHARACTERS} pixels or more, or differ by as many")
    return coco_mask.frPyObjects({"size": [height, width], "counts": joined}, height, width)["counts"]


def _join_runs(runs: np.ndarray) -> np.ndarray:
    """The same mask without empty runs, which would loosen pycocotools' boxes."""
    kept = np.flatnonzero(runs)
    first = np.flatnonzero(np.diff(kept % 2, prepend=-1))  # where background and foreground alternate
    joined = np.add.reduceat(runs[kept], first)
    return np.concatenate([[0], joined]) if kept[0] % 2 else joined


def _decode_polygons(text: bytes) -> list[list[float]]:
    if text[1:].lstrip().startswith(b"["):
        return msgspec.json.decode(text, type=list[list[float]])
    return [msgspec.json.decode(text, type=list[float])]


def _from_polygons(polygons: list[list[float]], height: int, width: int) -> bytes:
    """Polygons as pycocotools fills them; rings of fewer than three points enclose nothing and are dropped."""
    rings = [np.array(polygon) for polygon in polygons if len(polygon) >= 6]
    if not rings:
        raise DatasetError("polygon of fewer than three points")
    if any(len(ring) % 2 for ring in rings):
        raise DatasetError("polygon with an odd number of coordinates")
    if not all(np.abs(ring).max() < FARTHEST for ring in rings):  # so put that it holds for NaN too
        raise DatasetError("polygon coordinates are not finite, or far outside the image")
    length = sum(np.abs(ring[2:] - ring[:-2]).sum() for ring in rings)
    if length > LONGEST:
        raise DatasetError(f"polygon with an outline of {length:.0f} pixels")
    return coco_mask.merge(coco_mask.frPyObjects(rings, height, width))["counts"]
