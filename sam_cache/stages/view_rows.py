"""What the rows of a store show: of which image, in which view."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

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
        return np.cumsum(self.images.views == self.views.first) - 1

    @cached_property
    def kinds(self) -> np.ndarray:
        """Of each entry the kind of view: `identity`, `hflip`, `lsj` or `tile`."""
        return np.array([name.partition("/")[0] for name in self.images.views.tolist()])

    @cached_property
    def number_of(self) -> dict[int, int]:
        """The entry of each row."""
        return {row: number for number, row in enumerate(self.images.rows.tolist())}

    def among(self, views: Views) -> np.ndarray:
        """A boolean per entry: whether its view is one of `views`."""
        names = self.images.views.tolist()
        wanted = {name for name in set(names) if views.has(name)}
        return np.array([name in wanted for name in names], bool)

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
        return self.kinds == "tile" if view == "tile" else self.images.views == view

    def looks(self, rows: np.ndarray) -> np.ndarray | None:
        """Image and look of each row, as `Order` takes them; all tiles of an image together are one look at it.

        None where no image can be looked at in several ways.
        """
        entries = [self.number_of[row] for row in rows.tolist()]
        names = ["tile" if self.kinds[entry] == "tile" else self.images.views[entry] for entry in entries]
        known = {name: look for look, name in enumerate(dict.fromkeys(names))}
        pairs = (
            np.stack([self.image[entries], [known[name] for name in names]], axis=1) if entries else np.zeros((0, 2))
        )
        several = len(np.unique(pairs, axis=0)) > len(np.unique(pairs[:, 0]))
        return pairs if several else None

    def tiles(self, row: int) -> dict[int, Tile]:
        """The tiles of the image that this row shows, by their rows."""
        image = self.image[self.number_of[row]]
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
