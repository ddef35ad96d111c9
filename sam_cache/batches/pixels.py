"""Dataset images -> batches of encoder pixels, decoded in threads ahead of the encoder."""

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from sam_cache.batches.ahead import run_ahead
from sam_cache.data import WHOLE, Dataset, Decoded, Geometry, View, decode, to_pixels
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


class _Images:
    """Decoded images of a dataset with the sha256 of their files, each made once for all of its views.

    Several threads ask for images at once; views of one image are asked for in a row. The last `keep` images
    are kept.
    """

    def __init__(self, dataset: Dataset, intensity: str, keep: int):
        self._dataset, self._intensity, self._keep = dataset, intensity, keep
        self._lock = threading.Lock()
        self._made: dict[int, Future[tuple[Decoded, str]]] = {}

    def get(self, number: int) -> tuple[Decoded, str, bool]:
        """The image, its hash, and whether it was made by this call. Raises ImageError or OSError."""
        with self._lock:
            future = self._made.get(number)
            mine = future is None
            if mine:
                future = self._made[number] = Future()
                for oldest in list(self._made)[: -self._keep]:
                    del self._made[oldest]
        if mine:
            try:
                future.set_result(self._decode(number))
            except BaseException as error:  # whatever it is, others may be waiting
                future.set_exception(error)
        return *future.result(), mine

    def _decode(self, number: int) -> tuple[Decoded, str]:
        record = self._dataset.images[number]
        data = self._dataset.read(record)
        return decode(data, record, self._intensity), hashlib.sha256(data).hexdigest()


def pixel_batches(
    dataset: Dataset,
    numbered_rows: Iterable[tuple[int, int]],
    how: Preprocessing,
    batch_size: int,
    threads: int,
    view_of: Callable[[int], View] = lambda row: WHOLE,
) -> Iterator[PixelBatch]:
    """Batches for (image number, row) pairs, in their order; `view_of(row)` is what a row shows of its image.

    A bad image is a failure of all its rows, never an exception.
    """
    images = _Images(dataset, how.intensity, keep=threads)

    def load(pair: tuple[int, int]) -> _Loaded | tuple[int, str]:
        number, row = pair
        try:
            return _load(images, number, row, view_of(row), how)
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


def _load(images: _Images, number: int, row: int, view: View, how: Preprocessing) -> _Loaded:
    decoded, content_hash, first = images.get(number)
    image = view.show(decoded.image)
    geometry = Geometry(*image.shape[:2], how.input_size, how.fit)
    pixels = to_pixels(image, geometry, how.resize)
    return _Loaded(row, pixels, geometry, content_hash, decoded.notes if first else ())
