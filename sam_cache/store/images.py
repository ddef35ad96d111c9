"""The images of a store, as columns that are read when they are first asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sam_cache.store.stored_table import StoredTable
from sam_cache.types import ImageRecord


@dataclass(frozen=True, eq=False)
class ImageTable:
    """One entry per view of an image, in the order of the records; `rows[i]` is the store row of entry i.

    `ids` and `rows` are int64, `heights` and `widths`, in pixels of the view, int32; `paths`, `splits` and
    `views` are numpy's variable-width strings, whose items are `str`. `transforms` is (N, 2, 3) float64:
    view xy = transform @ (image xy, 1), as `sam_cache.types.ImageRecord` defines it. Not to be written to.

    `columns` are where they are read from: the first look at one raises DamageError if it is not what was committed.
    """

    columns: StoredTable
    length: int

    def __len__(self) -> int:
        return self.length

    @cached_property
    def ids(self) -> np.ndarray:
        return self.columns.read("id")

    @cached_property
    def paths(self) -> np.ndarray:
        return self.columns.read("path").to_text()

    @cached_property
    def heights(self) -> np.ndarray:
        return self.columns.read("height")

    @cached_property
    def widths(self) -> np.ndarray:
        return self.columns.read("width")

    @cached_property
    def splits(self) -> np.ndarray:
        return self.columns.read("split").to_text()

    @cached_property
    def rows(self) -> np.ndarray:
        return self.columns.read("row")

    @cached_property
    def views(self) -> np.ndarray:
        return self.columns.read("view").to_text()

    @cached_property
    def transforms(self) -> np.ndarray:
        found = self.columns.read("view_transform")
        # Without views all are the identity: one of them, shown as many, saves 48 bytes an image.
        same = len(found) > 0 and bool((found == found[0]).all())
        return np.broadcast_to(found[0].copy(), found.shape) if same else found

    def differences(self, records: Sequence[ImageRecord]) -> list[str]:
        """Where `records` begin to be other images than these; a prefix or a longer list is equal."""
        columns = [getattr(self, name).tolist() for name in ("ids", "paths", "heights", "widths", "views")]
        # Of an image in tiles the size may show only in where the last of them lie.
        ours = zip(*columns, map(tuple, self.transforms.reshape(len(self), 6).tolist()), strict=True)
        theirs = ((each.id, each.path, each.height, each.width, each.view, each.transform) for each in records)
        unequal = [(i, a, b) for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b]
        if not unequal:
            return []
        i, (*a, a_moved), (*b, b_moved) = unequal[0]
        more = f" and {len(unequal) - 1} more" if len(unequal) > 1 else ""
        if a != b:
            return [f"images[{i}] (id, path, height, width, view): {tuple(a)} != {tuple(b)}{more}"]
        return [f"images[{i}] (transform of {a[1]!r}, {a[4]}, by the image's size): {a_moved} != {b_moved}{more}"]
