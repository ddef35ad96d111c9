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
    named = np.array([_is_named_held_out(split) for split in splits], dtype=bool)
    if named.any() and not named.all():
        return named
    drawn = np.array([_uniform(image_id, seed) for image_id in image_ids.tolist()])
    held_out = drawn < fraction
    if fraction > 0 and len(drawn) > 1 and not held_out.any():
        held_out[drawn.argmin()] = True  # few images: an evaluation on none would say nothing
    return held_out


def _is_named_held_out(split: str) -> bool:
    part = split.partition("/")[0].lower()
    return any(name in part for name in HELD_OUT_SPLITS)


def _uniform(image_id: int, seed: int) -> float:
    digest = hashlib.blake2b(f"{seed}/{image_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64
