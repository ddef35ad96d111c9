"""The order in which rows are visited: a pure function of (seed, epoch), entered at any position."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np

from sam_cache.ranks import Ranks


@dataclass(frozen=True)
class Cursor:
    """Where a stream stands: after `position` visits of `epoch`, those of all ranks. Saved in checkpoints."""

    epoch: int = 0
    position: int = 0

    def state(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class Visit:
    """A row's turn: the `number`-th one in `epoch`, counted from 0."""

    row: int
    epoch: int = 0
    number: int = 0

    @property
    def key(self) -> int:
        """Keys chance: other turns of the same row in the same epoch get other prompts."""
        return self.epoch | self.number << 32


class Order:
    """Visits `rows` in epochs, each row `repeats` times in one, once unless given.

    A fraction of `repeats` is a chance: 1.25 is one turn, and in a quarter of the epochs a second one.

    `looks` (N, 2) groups rows that show the same image: row i belongs to look `looks[i, 1]` at image
    `looks[i, 0]`. Of an image's looks each epoch draws one, all of them equally often, and visits its rows
    alone.
    """

    def __init__(self, rows: np.ndarray, seed: int, repeats: np.ndarray | None = None, looks: np.ndarray | None = None):
        self.rows, self.seed = rows, seed
        self._repeats = np.ones(len(rows)) if repeats is None else repeats
        self._image = self._look = self._looks = None
        if looks is not None and len(rows):
            images, looked = _numbered(looks[:, 0]), _numbered(looks[:, 1])
            pairs, pair = np.unique(images * (looked.max() + 1) + looked, return_inverse=True)  # sorted by image
            _, first, self._looks = np.unique(pairs // (looked.max() + 1), return_index=True, return_counts=True)
            self._image, self._look = images, pair - first[images]

    def __len__(self) -> int:
        """Visits in an epoch, on average."""
        share = 1 if self._looks is None else 1 / self._looks[self._image]
        return round((self._repeats * share).sum())

    def epoch(self, epoch: int) -> list[Visit]:
        """The visits of one epoch in their order."""
        return _visits(*self.turns(epoch), epoch)

    def turns(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The same as row and number of each visit; of millions of rows `Visit`s would take seconds to make."""
        random = np.random.default_rng((self.seed, epoch))
        turns = np.floor(self._repeats + (random.random(len(self.rows)) if (self._repeats % 1).any() else 0))
        if self._looks is not None:
            drawn = (random.random(len(self._looks)) * self._looks).astype(int)
            turns *= self._look == drawn[self._image]
        counts = turns.astype(int)
        rows, firsts = self.rows.repeat(counts), (counts.cumsum() - counts).repeat(counts)
        numbers = np.arange(len(rows)) - firsts
        shuffled = random.permutation(len(rows))
        return rows[shuffled], numbers[shuffled]

    def batches(
        self, batch_size: int, start: Cursor = Cursor(), ranks: Ranks = Ranks()
    ) -> Iterator[tuple[Cursor, list[Visit]]]:
        """This rank's share of every batch from `start` on, for ever, with the cursor that stands after the batch.

        `batch_size` counts all ranks together, so their number does not change what a step sees; a share
        may be empty. The last batch of an epoch may be smaller: none is dropped, none comes twice.
        """
        epoch, position = start.epoch, start.position
        while True:
            rows, numbers = self.turns(epoch)
            while position < len(rows):
                share = slice(position + ranks.rank, position + batch_size, ranks.world)
                position = min(position + batch_size, len(rows))
                yield Cursor(epoch, position), _visits(rows[share], numbers[share], epoch)
            epoch, position = epoch + 1, 0


def _numbered(values: np.ndarray) -> np.ndarray:
    """Their places in the sorted list of those that differ."""
    return np.unique(values, return_inverse=True)[1]


def _visits(rows: np.ndarray, numbers: np.ndarray, epoch: int) -> list[Visit]:
    return [Visit(row, epoch, number) for row, number in zip(rows.tolist(), numbers.tolist(), strict=True)]
