"""The images of a store, as columns."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sam_cache.store.columns import Table
from sam_cache.types import ImageRecord


@dataclass(frozen=True, eq=False)
class ImageTable:
    """One entry per view of an image, in the order of the records; `rows[i]` is the store row of entry i.

    `ids` and `rows` are int64, `heights` and `widths`, in pixels of the view, int32; `paths`, `splits` and
    `views` are numpy's variable-width strings, whose items are `str`. `transforms` is (N, 2, 3) float64:
    view xy = transform @ (image xy, 1), as `sam_cache.types.ImageRecord` defines it.
    """

    ids: np.ndarray
    paths: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    splits: np.ndarray
    rows: np.ndarray
    views: np.ndarray
    transforms: np.ndarray

    @classmethod
    def from_columns(cls, table: Table) -> "ImageTable":
        def text(name: str) -> np.ndarray:
            return np.array([item.decode() for item in table[name]], np.dtypes.StringDType())

        return cls(
            ids=table["id"],
            paths=text("path"),
            heights=table["height"],
            widths=table["width"],
            splits=text("split"),
            rows=table["row"],
            views=text("view"),
            transforms=table["view_transform"],
        )

    def __len__(self) -> int:
        return len(self.ids)

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
