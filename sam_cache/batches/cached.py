"""Store rows with their prompts and targets, as an endless stream with an exact place."""

from collections.abc import Iterator, Sequence

import numpy as np

from sam_cache.batches.ahead import run_ahead
from sam_cache.batches.annotations import Annotator
from sam_cache.batches.order import Cursor, endless_batches
from sam_cache.store import EmbeddingStore, Ring
from sam_cache.types import Batch


class CachedBatches:
    """Training batches from a store, starting after `cursor`.

    Embeddings are read by the store's ring straight into reused tensors, prompts and targets are
    drawn in threads beside it. A batch's levels are valid until `keep` further batches were drawn.
    """

    def __init__(
        self,
        store: EmbeddingStore,
        annotator: Annotator,
        rows: np.ndarray,
        *,
        batch_size: int,
        seed: int,
        threads: int = 2,
        keep: int = 1,
        pin: bool = False,
        cursor: Cursor | None = None,
    ):
        self._store, self._annotator, self._rows = store, annotator, rows
        self._batch_size, self._seed, self._threads, self._keep, self._pin = (
            batch_size,
            seed,
            threads,
            keep,
            pin,
        )
        self._cursor = cursor or Cursor()

    def state(self) -> dict[str, int]:
        """The place after the last batch drawn; drawing ahead does not move it."""
        return self._cursor.state()

    def __iter__(self) -> Iterator[Batch]:
        start = self._cursor

        def plan() -> Iterator[tuple[Cursor, np.ndarray]]:
            return endless_batches(self._rows, self._batch_size, self._seed, start)

        annotations = run_ahead(
            lambda step: self._annotator.annotate(step[1], step[0].epoch),
            plan(),
            self._threads,
            ahead=2 * self._threads,
        )
        ring = Ring(
            self._store.reader(),
            (rows for _, rows in plan()),
            depth=self._keep + 3,
            threads=self._threads,
            keep=self._keep,
            pin=self._pin,
        )
        for (cursor, rows), levels, (prompts, targets, objects) in zip(plan(), ring, annotations, strict=False):
            self._cursor = cursor
            yield Batch(levels, prompts, targets, rows, objects)


def read_rows(store: EmbeddingStore, annotator: Annotator, rows: Sequence[int]) -> Iterator[Batch]:
    """One batch for each of `rows` in turn, with all its objects; rows without objects are passed over."""
    rows = [row for row in rows if row in annotator]
    annotations = run_ahead(lambda row: annotator.annotate([row]), rows, threads=1, ahead=2)
    ring = Ring(store.reader(), ([row] for row in rows), threads=1)
    for row, levels, (prompts, targets, objects) in zip(rows, ring, annotations, strict=True):
        yield Batch(levels, prompts, targets, np.array([row]), objects)
