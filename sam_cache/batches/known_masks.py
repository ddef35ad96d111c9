"""What is known of the masks of objects that come up again and again."""

import threading
from dataclasses import dataclass

import numpy as np

from sam_cache.data import ColumnRuns, Patch

KNOWN_BYTES = 2**28  # by default: 50,000 to 70,000 objects of 140x140 pixels
OVERHEAD, OF_ARRAY = 1300, 100  # bytes that Python takes for an entry and each of its arrays, beside what is in these


@dataclass(frozen=True, slots=True)
class KnownMask:
    """An object's mask: its coverage of cells, and its runs where points may be drawn from them."""

    patch: Patch
    runs: ColumnRuns | None


class KnownMasks:
    """Masks by the number of their object, in at most `limit` bytes: nothing leaves, what finds no room is not kept.

    That is the best for epochs, in which everything comes once: whatever else were dropped would be asked for again
    before it. Most cells of a patch are equal to their neighbour, so that runs of equal cells, which give back the
    same bits, take a fifth of its bytes, and are read in a fifth of the time that a mask takes to make. Threads may
    share one.
    """

    def __init__(self, limit: int = KNOWN_BYTES):
        self._limit, self._held, self._full = limit, 0, limit <= 0
        self._entries: dict[int, tuple] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return KnownMasks, (self._limit,)  # a copy for another process begins empty

    @property
    def nbytes(self) -> int:
        """How much is held."""
        return self._held

    def get(self, number: int) -> KnownMask | None:
        if (entry := self._entries.get(number)) is None:
            return None
        top, left, shape, values, counts, runs = entry
        return KnownMask(Patch(top, left, values.repeat(counts).reshape(shape)), runs)

    def keep(self, number: int, mask: KnownMask) -> None:
        """Hold on to a mask, unless one before it found no room."""
        if self._full:
            return
        patch, runs = mask.patch, mask.runs
        cells = patch.cells.ravel()
        ends = np.append(np.flatnonzero(cells[1:] != cells[:-1]), len(cells) - 1) if len(cells) else np.zeros(0, int)
        counts = _small(np.diff(ends, prepend=-1))
        arrays = [cells[ends], counts]
        if runs is not None:
            runs = ColumnRuns(_small(runs.columns), _small(runs.tops), _small(runs.bottoms), runs.offsets)
            arrays += [runs.columns, runs.tops, runs.bottoms, runs.offsets]
        size = OVERHEAD + sum(OF_ARRAY + array.nbytes for array in arrays)
        with self._lock:
            self._full = self._full or self._held + size > self._limit
            if number not in self._entries and not self._full:
                self._held += size
                self._entries[number] = (patch.top, patch.left, patch.cells.shape, *arrays[:2], runs)


def _small(numbers: np.ndarray) -> np.ndarray:
    """Whole numbers from 0 on in as few bytes as hold the largest; a copy."""
    return numbers.astype(np.min_scalar_type(numbers.max(initial=0)))
