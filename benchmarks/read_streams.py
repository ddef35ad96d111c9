"""Streams of batches for benchmarks/read.py: our ring, with and without masks and prompts, and two-worker DataLoaders.

Delivered to a loop that does nothing else. The first batches, which pay for fresh buffers and waiting queues, are not
counted. Box prompts and 256x256 masks of all objects of a row come beside it where the name says so: made by our ring
in threads, in a DataLoader row by row in its worker processes, by pycocotools and OpenCV as one writes it or, where it
says `our_masks`, by our code. Where it says `known`, our ring has made the masks of all rows in an epoch before and
kept them; a DataLoader keeps none. `RATIOS` says which streams are compared.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import chain, cycle, islice
from pathlib import Path

import cv2
import numpy as np
import torch
import zarr
from measure import Seconds, alternate
from pycocotools import mask as mask_utils
from read_contenders import Data, gather
from read_formats import npy_files
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sam_cache.batches import KNOWN_BYTES, Annotator, CachedBatches, Order, Preprocessing, Sampling, Visit
from sam_cache.batches.annotations import Annotation
from sam_cache.data import parse_prompts
from sam_cache.store import EmbeddingStore, Ring

SKIPPED = 4  # batches not counted at the start of a stream: no contender runs further ahead


class NpyRows(Dataset):
    """Rows as torch's tutorials would read them."""

    def __init__(self, files: list[Path]):
        self.files = files

    def __getitem__(self, row: int) -> Tensor:
        return torch.from_numpy(np.load(self.files[row]))


class MasksAsUsual:
    """Boxes (P, 4) of a row's objects in the input frame, and their masks (P, 256, 256): decoded, then shrunk."""

    def __init__(self, store: EmbeddingStore):
        images, objects = store.images, store.objects()
        self.sizes = dict(zip(images.rows.tolist(), zip(images.heights, images.widths, strict=True), strict=True))
        self.objects: dict[int, list] = {row: [] for row in self.sizes}
        for row, rle, box in zip(objects["row"].tolist(), objects["rle"], objects["box_xywh_image"], strict=True):
            self.objects[row].append((bytes(rle), box))

    def __call__(self, row: int) -> tuple[Tensor, Tensor]:
        (height, width), objects = self.sizes[row], self.objects[row]
        scale = 1024 / max(height, width)
        shape = round(width * scale / 4), round(height * scale / 4)
        masks = np.zeros((len(objects), 256, 256), np.float32)
        for mask, (rle, _) in zip(masks, objects, strict=True):
            pixels = np.ascontiguousarray(mask_utils.decode({"size": [int(height), int(width)], "counts": rle})) * 255
            mask[: shape[1], : shape[0]] = cv2.resize(pixels, shape, interpolation=cv2.INTER_AREA) / np.float32(255)
        x, y, w, h = np.array([box for _, box in objects], np.float32).reshape(-1, 4).T * np.float32(scale)
        return torch.from_numpy(np.stack([x, y, x + w, y + h], axis=1)), torch.from_numpy(masks)


class RowsWithMasks(Dataset):
    """The same with what our ring delivers beside them: `annotate(row)` makes it."""

    def __init__(self, rows: Dataset, annotate: Callable[[int], object]):
        self.rows, self.annotate = rows, annotate

    def __getitem__(self, row: int) -> tuple[Tensor, object]:
        return self.rows[row], self.annotate(row)


class OurMasks:
    """What our ring delivers beside a row, made one row at a time."""

    def __init__(self, data: Data):
        self.annotator = make_annotator(data)

    def __call__(self, row: int) -> Annotation:
        return self.annotator.annotate([Visit(row)])


def collate_as_usual(items: list[tuple[Tensor, tuple[Tensor, Tensor]]]) -> tuple[Tensor, Tensor, Tensor]:
    rows, annotations = zip(*items, strict=True)
    boxes, masks = zip(*annotations, strict=True)
    return torch.stack(rows), torch.cat(boxes), torch.cat(masks)


def collate_ours(items: list[tuple[Tensor, Annotation]]) -> tuple[Tensor, Annotation]:
    rows, annotations = zip(*items, strict=True)
    return torch.stack(rows), Annotation.join(annotations)


class ZarrRows(Dataset):
    def __init__(self, folder: Path):
        self.array = zarr.open_array(folder, mode="r")

    def __getitem__(self, row: int) -> Tensor:
        return torch.from_numpy(self.array[row])


Stream = Callable[[], Iterable[Tensor]]  # batches in the order given, then perhaps more


def ring(data: Data, batches: list[list[int]]) -> Stream:
    def stream() -> Iterator[Tensor]:
        for levels in Ring(data.store.reader(), batches):
            yield levels["neck"]

    return stream


def make_annotator(data: Data, known_bytes: int = 0) -> Annotator:
    sampling = Sampling(parse_prompts("box"), seed=0, training=True)
    return Annotator(data.store.images, data.store.objects(), Preprocessing(1024), 256, sampling, known_bytes)


class Given(Order):
    """The rows as they are listed, epoch after epoch, so that every contender delivers the same batches."""

    def turns(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        return self.rows, np.zeros(len(self.rows), int)


def ring_with_masks(data: Data, batches: list[list[int]], known_bytes: int = 0) -> Stream:
    """What `samcache train-top` is given in its first epoch: prompts, and 256x256 masks of all objects."""
    annotator = make_annotator(data, known_bytes)
    order = Given(np.array(list(dict.fromkeys(chain(*batches)))), seed=0)

    def stream() -> Iterator[Tensor]:
        for batch in CachedBatches(data.store, annotator, order, batch_size=len(batches[0])):
            yield batch.levels["neck"]

    return stream


def ring_with_known_masks(data: Data, batches: list[list[int]]) -> Stream:
    """What it is given from the second epoch on."""
    return ring_with_masks(data, batches, KNOWN_BYTES)


def loader(dataset: Dataset, batches: list[list[int]], **options) -> Stream:
    # Spawned, not forked: this process has threads of several libraries by now. They stay for all rounds.
    options |= {"num_workers": 2, "persistent_workers": True, "multiprocessing_context": "spawn"}
    together = DataLoader(dataset, batch_sampler=batches, **options)
    return lambda: together


def dataloader_npy(data: Data, batches: list[list[int]]) -> Stream:
    return loader(NpyRows(npy_files(data)), batches)


def dataloader_zarr(data: Data, batches: list[list[int]]) -> Stream:
    return loader(ZarrRows(data.store.path / "neck"), batches)


def one_thread(worker: int) -> None:
    cv2.setNumThreads(0)  # else every worker starts as many as there are cores


def with_masks(rows: Dataset, annotate: Callable, collate: Callable, batches: list[list[int]]) -> Stream:
    together = loader(RowsWithMasks(rows, annotate), batches, collate_fn=collate, worker_init_fn=one_thread)

    def stream() -> Iterator[Tensor]:
        for rows, *_ in together():
            yield rows

    return stream


def dataloader_npy_with_masks(data: Data, batches: list[list[int]]) -> Stream:
    return with_masks(NpyRows(npy_files(data)), MasksAsUsual(data.store), collate_as_usual, batches)


def dataloader_npy_with_our_masks(data: Data, batches: list[list[int]]) -> Stream:
    return with_masks(NpyRows(npy_files(data)), OurMasks(data), collate_ours, batches)


def dataloader_zarr_with_masks(data: Data, batches: list[list[int]]) -> Stream:
    rows = ZarrRows(data.store.path / "neck")
    return with_masks(rows, MasksAsUsual(data.store), collate_as_usual, batches)


STREAMS = (
    ring, ring_with_masks, ring_with_known_masks, dataloader_npy, dataloader_npy_with_masks,
    dataloader_npy_with_our_masks, dataloader_zarr, dataloader_zarr_with_masks,
)  # fmt: skip

# A ratio's name -> how many times slower the first stream was than the second.
RATIOS = {
    "delivered_vs_dataloader_npy": ("dataloader_npy", "ring"),
    "delivered_vs_dataloader_zarr": ("dataloader_zarr", "ring"),
    "delivered_with_masks_vs_dataloader_npy": ("dataloader_npy_with_masks", "ring_with_masks"),
    "delivered_with_masks_vs_dataloader_zarr": ("dataloader_zarr_with_masks", "ring_with_masks"),
    "delivered_with_masks_vs_dataloader_npy_with_our_masks": ("dataloader_npy_with_our_masks", "ring_with_masks"),
    "delivered_with_known_masks_vs_dataloader_npy": ("dataloader_npy_with_masks", "ring_with_known_masks"),
    "delivered_with_known_masks_vs_dataloader_zarr": ("dataloader_zarr_with_masks", "ring_with_known_masks"),
    "masks_vs_ring": ("ring_with_masks", "ring"),
    "known_masks_vs_ring": ("ring_with_known_masks", "ring"),
}


def time_streams(data: Data, batches: list[list[int]], rounds: int) -> tuple[Seconds, dict[str, str]]:
    """Seconds for as many batches as there are, after the first ones, per contender and round."""
    count = len(batches)
    streams, refused = gather(STREAMS, data, list(islice(cycle(batches), SKIPPED + count)))
    notes: dict[str, list[float]] = {name: [] for name in streams}

    def take_all(name: str) -> None:
        stream = iter(streams[name]())
        first = next(stream)
        if not notes[name] and not np.array_equal(first, data.values[batches[0]]):
            raise AssertionError(f"{name} did not deliver what was written")
        for _ in islice(stream, SKIPPED - 1):
            pass
        started = time.perf_counter()
        for _ in islice(stream, count):
            pass
        notes[name].append(time.perf_counter() - started)
        with suppress(AttributeError):
            stream.close()

    alternate({name: partial(take_all, name) for name in streams}, rounds)
    return {name: times[1:] for name, times in notes.items()}, refused
