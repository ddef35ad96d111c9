"""Dataset images -> batches of encoder pixels, decoded in threads ahead of the encoder."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from sam_cache.batches.ahead import run_ahead
from sam_cache.data import Dataset, Geometry, decode, to_pixels
from sam_cache.errors import ImageError


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes pixels; part of a store's identity."""

    input_size: int
    fit: str = "longest"
    normalise: str = "sam"
    resize: str = "upstream"
    intensity: str = "full"


@dataclass(frozen=True)
class PixelBatch:
    """Up to a batch of rows; those that could not be decoded are in `failures` (row -> reason).

    `pixels` (I, 3, S, S) is uint8, padded with zeros to the right and below; normalisation waits for
    the device. `content_hw` (I, 2) is the size of the image inside. `hashes` are sha256 of the files.
    """

    rows: list[int]
    pixels: Tensor
    content_hw: Tensor
    hashes: list[str]
    failures: dict[int, str]
    notes: list[str]


@dataclass(frozen=True)
class _Loaded:
    row: int
    pixels: np.ndarray
    geometry: Geometry
    content_hash: str
    notes: tuple[str, ...]


def pixel_batches(
    dataset: Dataset,
    numbered_rows: Iterable[tuple[int, int]],
    how: Preprocessing,
    batch_size: int,
    threads: int,
) -> Iterator[PixelBatch]:
    """Batches for (image number, row) pairs, in their order. A bad image is a failure, never an exception."""

    def load(pair: tuple[int, int]) -> _Loaded | tuple[int, str]:
        number, row = pair
        try:
            return _load(dataset, number, row, how)
        except (ImageError, OSError) as error:  # OSError: from a dataset given in Python
            return row, str(error)

    loaded = run_ahead(load, numbered_rows, threads, ahead=batch_size + threads)
    while chunk := list(islice(loaded, batch_size)):
        good = [item for item in chunk if isinstance(item, _Loaded)]
        size = how.input_size
        pixels = np.stack([item.pixels for item in good]) if good else np.zeros((0, size, size, 3), np.uint8)
        yield PixelBatch(
            rows=[item.row for item in good],
            pixels=torch.from_numpy(pixels).permute(0, 3, 1, 2),
            content_hw=torch.tensor(
                [(item.geometry.content_height, item.geometry.content_width) for item in good],
                dtype=torch.int64,
            ).reshape(-1, 2),
            hashes=[item.content_hash for item in good],
            failures=dict(item for item in chunk if not isinstance(item, _Loaded)),
            notes=[note for item in good for note in item.notes],
        )


def _load(dataset: Dataset, number: int, row: int, how: Preprocessing) -> _Loaded:
    record = dataset.images[number]
    data = dataset.read(record)
    decoded = decode(data, record, how.intensity)
    geometry = Geometry(*decoded.image.shape[:2], how.input_size, how.fit)
    pixels = to_pixels(decoded.image, geometry, how.resize)
    return _Loaded(row, pixels, geometry, hashlib.sha256(data).hexdigest(), decoded.notes)
