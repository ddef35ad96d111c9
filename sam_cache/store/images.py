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
        names = ("ids", "paths", "heights", "widths", "views")
        ours = zip(*(getattr(self, name).tolist() for name in names), strict=True)
        theirs = ((record.id, record.path, record.height, record.width, record.view) for record in records)
        unequal = [(i, a, b) for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b]
        if not unequal:
            return []
        i, a, b = unequal[0]
        more = f" and {len(unequal) - 1} more" if len(unequal) > 1 else ""
        return [f"images[{i}] (id, path, height, width, view): {a} != {b}{more}"]
