"""What the rows of a store show: of which image, in which view."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from sam_cache.batches import Places
from sam_cache.data import View, Views, parse_views
from sam_cache.errors import StoreError
from sam_cache.stages.tiles import Tile, lay_tiles
from sam_cache.store import EmbeddingStore, ImageTable
from sam_cache.types import ImageRecord


@dataclass(frozen=True, eq=False)
class ViewRows:
    """The entries of a store's image table, all views of one image after all of another; `views` are those it holds."""

    images: ImageTable
    views: Views

    @classmethod
    def of(cls, store: EmbeddingStore) -> "ViewRows":
        return cls(store.images, parse_views(store.spec.views))

    @cached_property
    def image(self) -> np.ndarray:
        """The number of each entry's image, counted from 0."""
        return np.cumsum(self._by_name(self.views.first.__eq__, bool)) - 1

    @cached_property
    def _named(self) -> tuple[list[str], np.ndarray]:
        """The names of views, each once, and of each entry the place of its view's name among them."""
        views = self.images.views
        if len(views) and (views == views[0]).all():  # a quick look: the rule, where no views were asked for
            return [str(views[0])], np.zeros(len(views), np.intp)
        listed = views.tolist()
        places = {name: place for place, name in enumerate(dict.fromkeys(listed))}
        return list(places), np.fromiter(map(places.__getitem__, listed), np.intp, len(listed))

    def _by_name(self, values: Callable[[str], Any], dtype: type | str) -> np.ndarray:
        """Of each entry, what `values` makes of its view's name."""
        names, places = self._named
        return np.array([values(name) for name in names], dtype)[places]

    @cached_property
    def kinds(self) -> np.ndarray:
        """Of each entry the kind of view: `identity`, `hflip`, `lsj` or `tile`."""
        return self._by_name(_kind_of, "U")

    @cached_property
    def _entries(self) -> Places:
        return Places(self.images.rows)

    def entries(self, rows: np.ndarray) -> np.ndarray:
        """The entries of rows. Raises KeyError for a row that has none."""
        return self._entries.of(rows)

    def among(self, views: Views) -> np.ndarray:
        """A boolean per entry: whether its view is one of `views`."""
        return self._by_name(views.has, bool)

    def check(self, asked: str | None, owner: str) -> Views:
        """The views asked for, all where None. Raises StoreError where the store does not hold them."""
        views = self.views if asked is None else parse_views(asked)
        if lacking := self.views.lacks(views):
            raise StoreError(
                f"--views {asked}: {owner} holds {self.views}, not {', '.join(lacking)}; "
                f"embed with --views {self._besides(views)} into another store"
            )
        return views

    def _besides(self, asked: Views) -> Views:
        """All that the store holds and what is asked for, which is not lost for it."""
        ours = self.views
        return Views(
            ours.identity or asked.identity, ours.hflip or asked.hflip, max(ours.lsj, asked.lsj),
            asked.tile or ours.tile,
        )  # fmt: skip

    def examine(self, kind: str | None, owner: str) -> str:
        """What of each image is looked at to evaluate: `identity`, `tile` for all of its tiles, or a view's name.

        By default that is the image itself; else all of its tiles; else its first view. Raises StoreError where
        the store has no view of `kind`.
        """
        held = ["identity"] * self.views.identity + ["tile"] * bool(self.views.tile)
        if kind is None:
            return (held or [self.views.first])[0]
        if kind not in held:
            example = parse_views("tile:1024:128" if kind == "tile" else kind)
            raise StoreError(
                f"--view {kind}: {owner} holds {self.views}; leave it, or embed with "
                f"--views {self._besides(example)} into another store"
            )
        return kind

    def showing(self, view: str) -> np.ndarray:
        """A boolean per entry: whether it is of this name, or any of the tiles for `tile`."""
        return self._by_name(lambda name: (_kind_of(name) if view == "tile" else name) == view, bool)

    def looks(self, rows: np.ndarray) -> np.ndarray | None:
        """Image and look of each row, as `Order` takes them; all tiles of an image together are one look at it.

        None where no image can be looked at in several ways.
        """
        entries, (names, places) = self.entries(rows), self._named
        looks = ["tile" if _kind_of(name) == "tile" else name for name in names]
        numbers, first, look = np.unique(
            np.array([looks.index(name) for name in looks], np.int64)[places[entries]],
            return_index=True, return_inverse=True,
        )  # fmt: skip
        if len(numbers) < 2:
            return None
        look, image = np.argsort(np.argsort(first))[look], self.image[entries]  # numbered as they first come
        order = np.lexsort((look, image))
        several = (np.diff(image[order]) == 0) & (np.diff(look[order]) != 0)
        return np.stack([image, look], axis=1) if several.any() else None

    def tiles(self, row: int) -> dict[int, Tile]:
        """The tiles of the image that this row shows, by their rows."""
        image = self.image[self.entries(np.array([row]))[0]]
        start, stop = np.searchsorted(self.image, [image, image + 1])  # all views of an image follow one another
        entries, images = start + np.flatnonzero(self.kinds[start:stop] == "tile"), self.images
        boxes = [
            (-int(images.transforms[entry, 0, 2]), -int(images.transforms[entry, 1, 2]),
             int(images.widths[entry]), int(images.heights[entry]))
            for entry in entries.tolist()
        ]  # fmt: skip
        return dict(zip(images.rows[entries].tolist(), lay_tiles(boxes), strict=True))

    def entries_by_id(self) -> dict[int, list[int]]:
        """The entries of each image, by its id."""
        found: dict[int, list[int]] = {}
        for entry, image_id in enumerate(self.images.ids.tolist()):
            found.setdefault(image_id, []).append(entry)
        return found

    def match(self, record: ImageRecord, entries: list[int]) -> list[View] | None:
        """The views of an image whose record is given, one per entry; None where it is of another size than these."""
        views, images = self.views.of(record), self.images
        moved = map(tuple, images.transforms[entries].reshape(len(entries), 6).tolist())
        ours = list(zip(images.views[entries], images.heights[entries], images.widths[entries], moved, strict=True))
        records = [view.record(record) for view in views]
        theirs = [(shown.view, shown.height, shown.width, shown.transform) for shown in records]
        return views if ours == theirs else None


def _kind_of(name: str) -> str:
    return name.partition("/")[0]
