"""Scores of many objects, and what they say: means with intervals, per prompt kind and size."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from sam_cache.errors import SamcacheError

SIZES = {  # of objects, by their area in pixels of the image: COCO's, half open here
    "all": (0, np.inf),
    "small": (0, 32**2),
    "medium": (32**2, 96**2),
    "large": (96**2, np.inf),
}


class ObjectScore(NamedTuple):
    """One answer to one prompt. `area` is the true mask's, in pixels of the image."""

    kind: str
    image: int
    object: int
    area: float
    iou: float
    dice: float
    boundary_iou: float
    predicted_iou: float


@dataclass(frozen=True)
class Scores:
    """The columns of N `ObjectScore`s."""

    kind: np.ndarray
    image: np.ndarray
    object: np.ndarray
    area: np.ndarray
    iou: np.ndarray
    dice: np.ndarray
    boundary_iou: np.ndarray
    predicted_iou: np.ndarray

    @classmethod
    def of(cls, rows: Iterable[ObjectScore]) -> "Scores":
        columns = list(zip(*rows, strict=True)) or [()] * len(fields(cls))
        types = (str, np.int64, np.int64, *[np.float64] * 5)
        return cls(*(np.asarray(column, dtype) for column, dtype in zip(columns, types, strict=True)))

    def select(self, chosen: np.ndarray) -> "Scores":
        """Those scores that a boolean (N,) or an index says, in its order."""
        return Scores(*(getattr(self, field.name)[chosen] for field in fields(self)))

    def __len__(self) -> int:
        return len(self.iou)


def summarise(scores: Scores, seed: int = 0, resamples: int = 1000) -> dict:
    """Means per prompt kind and object size, with bootstrap 95% intervals over images.

        {kind: {size: {"objects": n, "images": n,
                       "iou" | "dice" | "boundary_iou" | "predicted_iou" | "predicted_iou_error":
                           {"mean": x, "low": x, "high": x}}}}

    Means are over objects; `predicted_iou_error` is the IoU head's mean absolute error. A size
    without objects is left out. The result is plain data, fit for JSON.
    """
    values = {
        "iou": scores.iou,
        "dice": scores.dice,
        "boundary_iou": scores.boundary_iou,
        "predicted_iou": scores.predicted_iou,
        "predicted_iou_error": np.abs(scores.predicted_iou - scores.iou),
    }
    return _by_kind_and_size(scores, values, seed, resamples)


def compare(tuned: Scores, untouched: Scores, seed: int = 0, resamples: int = 1000) -> dict:
    """Differences, tuned minus untouched, of the same prompts, in the form of `summarise`.

    Pairing removes what makes objects differ from each other, so the interval is that of the gain
    itself. Raises SamcacheError when the two did not answer the same prompts.
    """
    tuned, untouched = _in_order(tuned), _in_order(untouched)
    for name in ("kind", "image", "object"):
        if not np.array_equal(getattr(tuned, name), getattr(untouched, name)):
            raise SamcacheError(
                f"tuned ({len(tuned)} scores) and untouched ({len(untouched)} scores) differ in their "
                f"column {name!r}: evaluate both on the same rows, prompts and seed"
            )
    names = ("iou", "dice", "boundary_iou")
    values = {name: getattr(tuned, name) - getattr(untouched, name) for name in names}
    return _by_kind_and_size(tuned, values, seed, resamples)


def _in_order(scores: Scores) -> Scores:
    return scores.select(np.lexsort((scores.object, scores.image, scores.kind)))


def _by_kind_and_size(scores: Scores, values: dict[str, np.ndarray], seed: int, resamples: int) -> dict:
    table = np.stack(list(values.values()), axis=1)
    summary: dict = {}
    for kind in dict.fromkeys(scores.kind.tolist()):
        for size, (low, high) in SIZES.items():
            chosen = (scores.kind == kind) & (low <= scores.area) & (scores.area < high)
            if not chosen.any():
                continue
            means, lows, highs, images = _bootstrap(table[chosen], scores.image[chosen], seed, resamples)
            summary.setdefault(kind, {})[size] = {"objects": int(chosen.sum()), "images": images} | {
                name: {"mean": float(mean), "low": float(low), "high": float(high)}
                for name, mean, low, high in zip(values, means, lows, highs, strict=True)
            }
    return summary


def _bootstrap(
    values: np.ndarray, images: np.ndarray, seed: int, resamples: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Column means of (N, C) values, their 2.5% and 97.5% bootstrap percentiles, and the image count.

    Images are resampled, not objects, because objects of one image succeed and fail together (the
    cluster bootstrap; Davison and Hinkley 1997, section 3.8). A resample is a row of image counts, so
    sums and object numbers per image are all that is needed.
    """
    _, image = np.unique(images, return_inverse=True)
    number = np.bincount(image)
    sums = np.stack([np.bincount(image, column) for column in values.T], axis=1)

    generator = np.random.default_rng(seed)
    means = np.empty((resamples, values.shape[1]))
    block = max(1, 2**22 // len(number))  # resamples at a time: bounds the memory
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = generator.integers(len(number), size=(rows, len(number)))
        drawn += np.arange(rows)[:, None] * len(number)
        times = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(rows, -1).astype(np.float64)
        means[start : start + rows] = (times @ sums) / (times @ number)[:, None]
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return values.mean(axis=0), low, high, len(number)
