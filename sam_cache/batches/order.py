"""The order in which rows are visited: a pure function of (seed, epoch), entered at any position."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np


@dataclass
class Cursor:
    """Where a stream stands: after `position` rows of `epoch`. Saved in checkpoints."""

    epoch: int = 0
    position: int = 0

    def state(self) -> dict[str, int]:
        return asdict(self)


def shuffled(rows: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """The rows of one epoch in their order."""
    return rows[np.random.default_rng((seed, epoch)).permutation(len(rows))]


def endless_batches(rows: np.ndarray, batch_size: int, seed: int, start: Cursor) -> Iterator[tuple[Cursor, np.ndarray]]:
    """Batches of rows from `start` on, for ever, each with the cursor that stands *after* it.

    The last batch of an epoch may be smaller: no row is seen twice in an epoch, none is dropped.
    """
    epoch, position = start.epoch, start.position
    while True:
        order = shuffled(rows, seed, epoch)
        while position < len(order):
            chosen = order[position : position + batch_size]
            position += len(chosen)
            yield Cursor(epoch, position), chosen
        epoch, position = epoch + 1, 0
