"""What training and evaluation read: a store's embeddings, its objects or others, and who is held out."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from sam_cache.batches import (
    KNOWN_BYTES,
    Annotator,
    Places,
    Preprocessing,
    Sampling,
    Visit,
    is_held_out,
    object_columns,
    read_rows,
)
from sam_cache.data import PromptMixture, View, crop_rle, mask_to_rle, measure_rle, open_annotations
from sam_cache.errors import DatasetError, StoreError
from sam_cache.stages.coco_format import coco_annotation, coco_image
from sam_cache.stages.exam import Exam
from sam_cache.stages.progress import Bar, say, say_some
from sam_cache.stages.source import Pictures
from sam_cache.stages.tiles import Tile, unite
from sam_cache.stages.view_rows import ViewRows
from sam_cache.store import OK, EmbeddingStore, StoreSpec, Table


@dataclass(frozen=True)
class CachedData:
    """An opened store with the objects to use, and its readable rows with objects as `train` and `held_out`.

    `categories` are those of the objects, as COCO lists them. `trainable` are the rows of all images in the
    views to train on, `rows` one for each image in the `view` to evaluate; where that is `tile`, an image's
    first tile stands for all of them, and `incomplete` images are left out, of which a tile is not there. It is
    a `stages.exam.Data`.
    """

    store: EmbeddingStore
    objects: Table
    categories: list[dict]
    train: np.ndarray
    held_out: np.ndarray
    trainable: np.ndarray
    rows: np.ndarray
    shows: ViewRows
    view: str
    incomplete: int
    levels: tuple[str, ...]

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        annotations: Path | None,
        partial: bool,
        held_out: float,
        seed: int,
        levels: tuple[str, ...] = ("neck",),
        views: str | None = None,
        view: str | None = None,
    ) -> "CachedData":
        """Train on `views`, all the store's unless given; evaluate on the kind `view`, see `ViewRows.examine`.

        All views of an image are held out together. Raises StoreError for views that the store does not hold,
        and for a store with uncommitted shards, unless `partial`.
        """
        store = EmbeddingStore.open(path)
        store.reader(levels)  # refuses, with the remedy, those that it does not have
        if (missing := len(store.uncommitted())) and not partial:
            raise StoreError(
                f"{path}: {missing} of {len(store.shards())} shards are not committed; run the same "
                "`samcache embed` again to finish it, or use what is there with --partial"
            )
        shows = ViewRows.of(store)
        to_train, view = shows.among(shows.check(views, str(path))), shows.examine(view, str(path))
        if annotations is None:
            objects, categories = store.objects(), store.object_attributes()["categories"]
        else:
            objects, categories = objects_from(annotations, store.path, shows)
        images, readable = store.images, store.row_states[store.images.rows] == OK
        useful = np.flatnonzero(readable & np.isin(images.rows, objects["row"]))
        begins = np.diff(shows.image[useful], prepend=-1) > 0
        image, ones = begins.cumsum() - 1, useful[begins]  # an image counts once, however many views there are
        with ThreadPoolExecutor(1) as beside:
            beside.submit(objects.__getitem__, "rle")  # will be wanted; hashing ids leaves a core and the disk idle
            apart = is_held_out(images.ids[ones], images.splits[ones], held_out, seed)[image]
        to_train, to_examine, incomplete = to_train[useful], shows.showing(view)[useful], 0
        if view == "tile":
            examined = np.flatnonzero(to_examine)
            to_examine[examined] = np.diff(image[examined], prepend=-1) > 0
            # An object would be scored on the part of it that is there.
            lacking = np.isin(shows.image[useful], shows.image[shows.showing(view) & ~readable])
            incomplete = int((to_examine & lacking).sum())
            to_examine &= ~lacking
        rows = images.rows[useful]
        return cls(
            store, objects, categories, rows[to_train & ~apart], rows[to_examine & apart], rows[to_train],
            rows[to_examine], shows, view, incomplete, levels,
        )  # fmt: skip

    @property
    def tiled(self) -> bool:
        return self.view == "tile"

    def say_what_is_scored(self) -> None:
        """Tell the person where that is less than all images, or less than the whole of each."""
        if self.view not in ("identity", "tile"):
            say(
                f"{self.store.path} holds {self.shows.views} only: images are scored on their first view, {self.view}; "
                "embed identity too to score whole images"
            )
        if self.incomplete:
            say(
                f"{self.store.path}: {self.incomplete} images are not scored, since a tile of each failed or is not "
                "embedded yet; run the same `samcache embed` again, for failed tiles `samcache verify --retry-failed` "
                "first"
            )

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing(**self.store.spec.preprocessing)

    def annotator(self, resolution: int, sampling: Sampling, known_bytes: int = KNOWN_BYTES) -> Annotator:
        return Annotator(self.store.images, self.objects, self.preprocessing, resolution, sampling, known_bytes)

    @property
    def where(self) -> str:
        return str(self.store.path)

    @property
    def style(self) -> str:
        return "lvis" if (self.store.object_attributes()["dataset"] or {}).get("dataset") == "lvis" else "coco"

    def exams(
        self, rows: Sequence[int], kinds: Sequence[PromptMixture], seed: int, resolution: int
    ) -> Iterator[list[Exam]]:
        # Each row is asked about once: what is known of its masks is not kept.
        annotators = [self.annotator(resolution, Sampling(kind, seed, training=False), 0) for kind in kinds]
        tiles: dict[int, tuple[int, Tile]] = {}
        if self.tiled:
            tiles = {each: (row, tile) for row in rows for each, tile in self.shows.tiles(row).items()}
        for batch in read_rows(self.store, annotators[0], list(tiles) or rows, self.levels):
            row = int(batch.rows[0])
            rles = [self.objects["rle"][index] for index in batch.objects.tolist()]
            categories = self.objects["category"][batch.objects].tolist()
            ids = self.objects["id"][batch.objects].tolist()
            whole, tile = tiles.get(row, (row, None))
            exams = []
            for kind, annotator in zip(kinds, annotators, strict=True):
                if exams:
                    found = annotator.annotate([Visit(row)])
                    batch = replace(batch, prompts=found.prompts, targets=found.targets)
                image_id, geometry = annotator.image_id(row), annotator.geometry(row)
                exams.append(Exam(whole, image_id, kind, geometry, batch, rles, categories, tile, ids))
            yield exams

    def categories_of(self, rows: np.ndarray) -> list[np.ndarray]:
        asked = ~self.objects["iscrowd"] & (self.objects["area"] > 0)
        by_row = Places(self.objects["row"][asked])
        categories = self.objects["category"][asked][by_row.places]
        starts, stops = by_row.ranges(rows)
        return [categories[start:stop] for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]

    def ground_truth(self, rows: np.ndarray) -> dict:
        if self.tiled:
            return self._ground_truth_of_tiles(rows)
        images, objects = self.store.images, self.objects
        ids, sizes = images.ids.tolist(), list(zip(images.heights.tolist(), images.widths.tolist(), strict=True))
        numbers = self.shows.entries(rows).tolist()
        annotations = []
        ours = np.flatnonzero(np.isin(objects["row"], rows))
        for index, number in zip(ours.tolist(), self.shows.entries(objects["row"][ours]).tolist(), strict=True):
            of_object = (objects[name][index] for name in ("category", "box_xywh_image", "area", "iscrowd", "rle"))
            annotations.append(coco_annotation(index + 1, ids[number], *of_object, sizes[number]))
        return {
            "images": [coco_image(ids[number], *sizes[number]) for number in numbers],
            "categories": self.categories,
            "annotations": annotations,
        }

    def _ground_truth_of_tiles(self, rows: np.ndarray) -> dict:
        """The same for images stored in tiles: what these hold of an object, put together."""
        images, objects = self.store.images, self.objects
        tiles_of = {row: self.shows.tiles(row) for row in rows.tolist()}
        ours = np.isin(objects["row"], [each for tiles in tiles_of.values() for each in tiles])
        of_row: dict[int, list[int]] = {}
        for index in np.flatnonzero(ours).tolist():
            of_row.setdefault(int(objects["row"][index]), []).append(index)
        entries, annotations = [], []
        for row, tiles in tiles_of.items():
            image_id, parts = int(images.ids[self.shows.entries(np.array([row]))[0]]), {}
            size = tiles[row].size
            entries.append(coco_image(image_id, *size))
            for tile_row, tile in tiles.items():
                shape = tile.shown[0].stop - tile.shown[0].start, tile.shown[1].stop - tile.shown[1].start
                for index in of_row.get(tile_row, []):
                    mask = crop_rle(objects["rle"][index], *shape)
                    parts.setdefault(int(objects["id"][index]), []).append((index, tile, mask))
            for found in parts.values():
                index = found[0][0]
                rle = mask_to_rle(unite([(tile, mask) for _, tile, mask in found]).whole(*size))
                category, iscrowd = objects["category"][index], objects["iscrowd"][index]
                annotations.append(
                    coco_annotation(index + 1, image_id, category, *measure_rle(rle, *size), iscrowd, rle, size)
                )
        return {"images": entries, "categories": self.categories, "annotations": annotations}

    def looks(self, rows: np.ndarray) -> np.ndarray | None:
        return self.shows.looks(rows)

    def report_problems(self) -> None:
        """Nothing: what could not be read was never embedded."""

    def picture(self, row: int) -> np.ndarray:
        if self.tiled:
            return self._pictures.whole(row, next(iter(self.shows.tiles(row).values())).size)
        return self._pictures.image(row)

    @cached_property
    def _pictures(self) -> Pictures:
        return Pictures(self.store)

    def names(self, rows: np.ndarray) -> list[str]:
        """What images are called in any store that holds them: id and path."""
        images, entries = self.store.images, self.shows.entries(rows)
        ids, paths = images.ids[entries].tolist(), images.paths[entries].tolist()
        return [f"{id} {path}" for id, path in zip(ids, paths, strict=True)]

    def sets_of(self, rows: np.ndarray) -> list[str]:
        splits = self.store.images.splits[self.shows.entries(rows)]
        return [split.partition("/")[2] for split in splits.tolist()]

    def check_encoder(self, identity: dict, owner: str) -> None:
        """Raises StoreError unless this store's embeddings mean the same as those of `identity`."""
        other = StoreSpec.from_json(identity)
        same = ("encoder", "preprocessing")
        if differing := [text for text in self.store.spec.differences(other) if text.startswith(same)]:
            raise StoreError(f"{self.store.path} != {owner}: {'; '.join(differing)}; use a store of the same encoder")

    def training_on(self, rows: np.ndarray) -> "CachedData":
        """The same data with other rows to train on."""
        return replace(self, train=rows)

    def holding_out(self, trained: list[str], held_out: list[str]) -> "CachedData":
        """The same data, held out exactly as a run recorded by `names`; images it did not know are new."""
        known = bool(np.isin(self.names(self.rows), held_out).any())

        def apart(rows: np.ndarray) -> np.ndarray:
            names = self.names(rows)
            return np.isin(names, held_out) if known else ~np.isin(names, trained)

        train, held = ~apart(self.trainable), apart(self.rows)
        return replace(self, train=self.trainable[train], held_out=self.rows[held])


def objects_from(annotations: Path, path: Path, shows: ViewRows) -> tuple[Table, list[dict]]:
    """Objects of another annotation file for the images of the store at `path`, matched by id; and its categories.

    Every view of an image gets those that are in it. Raises DatasetError where no image matches; images of
    another size are left out, and said.
    """
    dataset, entries_of = open_annotations(annotations), shows.entries_by_id()
    pairs, misfits = [], []
    view_of: dict[int, View] = {}
    for number, record in enumerate(dataset.images):
        if (entries := entries_of.get(record.id)) is None:
            continue
        if (views := shows.match(record, entries)) is None:
            misfits.append(f"{annotations}: {record.path} has another size than in {path}")
            continue
        rows = shows.images.rows[entries].tolist()
        pairs += [(number, row) for row in rows]
        view_of.update(zip(rows, views, strict=True))
    if not pairs:
        raise DatasetError(
            f"{annotations}: none of its {len(dataset.images)} image ids is in {path}; "
            "use the annotations of the images that were embedded"
        )
    with Bar("reading annotations", len(pairs), "images") as bar:
        table = object_columns(dataset, pairs, bar.advance, view_of.__getitem__)
    say_some("skipped", misfits + dataset.problems)
    return table, dataset.list_categories()
