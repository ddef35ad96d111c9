"""Store rows with their prompts and targets, as an endless stream with an exact place."""

from collections.abc import Iterator, Sequence
from itertools import cycle, tee

import numpy as np

from sam_cache.batches.ahead import run_ahead
from sam_cache.batches.annotations import Annotation, Annotator
from sam_cache.batches.canvas import Canvas
from sam_cache.batches.order import Cursor, Order, Visit
from sam_cache.ranks import Ranks
from sam_cache.store import EmbeddingStore, Ring
from sam_cache.types import Batch


class CachedBatches:
    """Training batches from a store, starting after `cursor`; None where this rank's share of one is empty.

    Embeddings are read by the store's ring straight into reused tensors, and threads beside it draw prompts and
    targets, these into reused tensors too. A batch's levels and targets are valid until `keep` further batches
    were drawn, and not to be written to.
    `batch_size` counts the rows of all ranks together, `levels` are those to read.
    """

    def __init__(
        self,
        store: EmbeddingStore,
        annotator: Annotator,
        order: Order,
        *,
        batch_size: int,
        levels: Sequence[str] = ("neck",),
        ranks: Ranks = Ranks(),
        threads: int = 2,
        keep: int = 1,
        pin: bool = False,
        cursor: Cursor | None = None,
    ):
        self._store, self._annotator, self._order = store, annotator, order
        self._batch_size, self._ranks, self._threads = batch_size, ranks, threads
        self._keep, self._pin, self._levels = keep, pin, levels
        self._cursor = cursor or Cursor()

    def state(self) -> dict[str, int]:
        """The place after the last batch drawn; drawing ahead does not move it."""
        return self._cursor.state()

    def __iter__(self) -> Iterator[Batch | None]:
        plan, to_read, to_annotate = tee(self._order.batches(self._batch_size, self._cursor, self._ranks), 3)
        ahead = self._threads + 1
        canvases = cycle([self._annotator.canvas(self._pin) for _ in range(ahead + self._keep)])
        annotations = run_ahead(
            self._annotate,
            ((visits, next(canvases)) for _, visits in to_annotate if visits),
            self._threads,
            ahead,
        )
        ring = Ring(
            self._store.reader(self._levels),
            ([visit.row for visit in visits] for _, visits in to_read if visits),
            depth=self._keep + 3,
            threads=self._threads,
            keep=self._keep,
            pin=self._pin,
        )
        filled = zip(ring, annotations, strict=True)
        for cursor, visits in plan:
            batch = None
            if visits:
                levels, found = next(filled)
                rows = np.array([visit.row for visit in visits])
                batch = Batch(levels, found.prompts, found.targets, rows, found.objects)
            self._cursor = cursor
            yield batch

    def _annotate(self, work: tuple[list[Visit], Canvas]) -> Annotation:
        return self._annotator.annotate(*work)


def read_rows(
    store: EmbeddingStore, annotator: Annotator, rows: Sequence[int], levels: Sequence[str] = ("neck",)
) -> Iterator[Batch]:
    """One batch for each of `rows` in turn, with all its objects; rows without objects are passed over."""
    rows = np.asarray(rows, np.int64)
    rows = rows[annotator.has_objects(rows)].tolist()
    annotations = run_ahead(lambda row: annotator.annotate([Visit(row)]), rows, threads=1, ahead=2)
    ring = Ring(store.reader(levels), ([row] for row in rows), threads=1)
    for row, filled, found in zip(rows, ring, annotations, strict=True):
        yield Batch(filled, found.prompts, found.targets, np.array([row]), found.objects)
