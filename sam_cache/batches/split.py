"""Which images are held out from training."""

import hashlib
from collections.abc import Sequence

import numpy as np

HELD_OUT_SPLITS = ("val", "test")


def is_held_out(image_ids: np.ndarray, splits: Sequence[str], fraction: float, seed: int) -> np.ndarray:
    """A boolean per image. Named splits decide where there are both kinds; else a hash of id and seed.

    Splits whose name holds `val` or `test` are held out; of a set's split, such as `train/ecssd-test`, what
    stands before the slash decides. The hash depends on seed and image id alone, so
    all views of an image fall on one side, and a dataset that grows keeps its sides, unless it was so
    small that none fell under `fraction` and the nearest was taken.
    """
    listed = splits.tolist() if isinstance(splits, np.ndarray) else splits
    sides = {split: _is_named_held_out(split) for split in set(listed)}
    if len(set(sides.values())) == 2:
        return np.fromiter(map(sides.__getitem__, listed), bool, len(listed))
    if fraction <= 0:
        return np.zeros(len(image_ids), bool)
    drawn = _uniform(image_ids, seed)
    held_out = drawn < fraction
    if len(drawn) > 1 and not held_out.any():
        held_out[drawn.argmin()] = True  # few images: an evaluation on none would say nothing
    return held_out


def _is_named_held_out(split: str) -> bool:
    part = split.partition("/")[0].lower()
    return any(name in part for name in HELD_OUT_SPLITS)


def _uniform(image_ids: np.ndarray, seed: int) -> np.ndarray:
    """A number in [0, 1) for each image, float64, from a hash of seed and id."""
    texts = [b"%d/%d" % (seed, image_id) for image_id in image_ids.tolist()]
    digests = b"".join([hashlib.blake2b(text, digest_size=8).digest() for text in texts])
    return np.frombuffer(digests, "<u8") / 2.0**64
