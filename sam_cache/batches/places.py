"""Where numbers stand in a column."""

import numpy as np


class Places:
    """Finds numbers in a column (N,) of whole numbers by searching, where a dictionary of millions takes seconds."""

    def __init__(self, column: np.ndarray):
        self._order = None if (column[1:] >= column[:-1]).all() else np.argsort(column, kind="stable")
        self._sorted = column if self._order is None else column[self._order]

    def ranges(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """From where to where in `places` each of the numbers stands."""
        return self._sorted.searchsorted(numbers, "left"), self._sorted.searchsorted(numbers, "right")

    @property
    def places(self) -> np.ndarray:
        """All places of the column, those of equal numbers following one another as in the column."""
        return np.arange(len(self._sorted)) if self._order is None else self._order

    def of(self, numbers: np.ndarray) -> np.ndarray:
        """The first place of each of the numbers. Raises KeyError for one that is not there."""
        found = self._sorted.searchsorted(numbers)
        missing = np.ones(len(found), bool)
        inside = found < len(self._sorted)
        missing[inside] = self._sorted[found[inside]] != np.asarray(numbers)[inside]
        if missing.any():
            raise KeyError(int(np.asarray(numbers)[missing][0]))
        return found if self._order is None else self._order[found]
