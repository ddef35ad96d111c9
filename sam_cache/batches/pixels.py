"""Dataset images -> batches of encoder pixels, decoded in threads ahead of the encoder or, with 0 threads, in turn."""

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from operator import itemgetter

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
    geometry: Geometry
    content_hash: str
    notes: tuple[str, ...]


class _Image:
    """An image of a dataset with the sha256 of its file, made when a thread first asks for it.

    Rows that show it, one after the other, share it; it is let go of with the last of them.
    """

    def __init__(self, dataset: Dataset, number: int, intensity: str):
        self._dataset, self._record, self._intensity = dataset, dataset.images[number], intensity
        self._lock = threading.Lock()
        self._made: tuple[Decoded, str] | Exception | None = None

    def get(self) -> tuple[Decoded, str, bool]:
        """The image, its hash, and whether it was made by this call. Raises what reading or decoding it raised."""
        with self._lock:
            mine = self._made is None
            if mine:
                self._made = self._make()
        if isinstance(self._made, Exception):
            raise self._made
        return *self._made, mine

    def _make(self) -> tuple[Decoded, str] | Exception:
        try:
            data = self._dataset.read(self._record)
            return decode(data, self._record, self._intensity), hashlib.sha256(data).hexdigest()
        except Exception as error:
            return error


def pixel_batches(
    dataset: Dataset,
    numbered_rows: Iterable[tuple[int, int]],
    how: Preprocessing,
    batch_size: int,
    threads: int,
    view_of: Callable[[int], View] = lambda row: WHOLE,
    pinned: bool = False,
) -> Iterator[PixelBatch]:
    """Batches for (image number, row) pairs, in their order; `view_of(row)` is what a row shows of its image.

    Within one call an image is decoded once for all of its rows that follow one another. A bad image is a
    failure of all its rows, never an exception. With `pinned` what goes to a GPU lies where it can be copied
    from while the GPU computes.
    """

    def placed() -> Iterator[tuple[_Image, int, Tensor, int]]:
        """Every row with the batch that its pixels go to, and its place there."""
        place, pixels = batch_size, None
        for number, pairs in groupby(numbered_rows, key=itemgetter(0)):
            image = _Image(dataset, number, how.intensity)
            for _, row in pairs:
                if place == batch_size:
                    size = (batch_size, how.input_size, how.input_size, 3)
                    place, pixels = 0, torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
                yield image, row, pixels, place
                place += 1

    def load(item: tuple[_Image, int, Tensor, int]) -> tuple[Tensor, _Loaded | tuple[int, str]]:
        image, row, pixels, place = item
        try:
            return pixels, _load(image, row, view_of(row), how, pixels[place].numpy())
        except (ImageError, OSError) as error:  # OSError: from a dataset given in Python
            return pixels, (row, str(error))

    loaded = run_ahead(load, placed(), threads, ahead=batch_size + threads)
    while chunk := list(islice(loaded, batch_size)):
        pixels, items = chunk[0][0], [item for _, item in chunk]
        places = [place for place, item in enumerate(items) if isinstance(item, _Loaded)]
        good = [items[place] for place in places]
        # Each image was resized straight into its place; only where one failed the others move up.
        pixels = pixels[: len(good)] if len(good) == len(items) else pixels[places]
        content_hw = torch.tensor(
            [(item.geometry.content_height, item.geometry.content_width) for item in good], dtype=torch.int64
        ).reshape(-1, 2)
        yield PixelBatch(
            rows=[item.row for item in good],
            pixels=pixels.permute(0, 3, 1, 2),
            content_hw=content_hw.pin_memory() if pinned else content_hw,
            hashes=[item.content_hash for item in good],
            failures=dict(item for item in items if not isinstance(item, _Loaded)),
            notes=[note for item in good for note in item.notes],
        )


def _load(image: _Image, row: int, view: View, how: Preprocessing, pixels: np.ndarray) -> _Loaded:
    """Put the pixels of a row in their place."""
    decoded, content_hash, first = image.get()
    shown = view.show(decoded.image)
    geometry = Geometry(*shown.shape[:2], how.input_size, how.fit)
    to_pixels(shown, geometry, how.resize, pixels)
    return _Loaded(row, geometry, content_hash, decoded.notes if first else ())
