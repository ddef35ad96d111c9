"""What training and evaluation read: a store's embeddings, its objects or others, and who is held out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from sam_cache.batches import (
    Annotator,
    Preprocessing,
    Sampling,
    Visit,
    is_held_out,
    object_columns,
    read_rows,
)
from sam_cache.data import PromptMixture, open_annotations
from sam_cache.errors import DatasetError, StoreError
from sam_cache.stages.coco_format import coco_annotation, coco_image
from sam_cache.stages.exam import Exam
from sam_cache.stages.progress import Bar, say_some
from sam_cache.stages.source import Pictures
from sam_cache.store import OK, EmbeddingStore, StoreSpec, Table


@dataclass(frozen=True)
class CachedData:
    """An opened store with the objects to use, and its readable rows with objects as `train` and `held_out`.

    `categories` are those of the objects, as COCO lists them. It is a `stages.exam.Data`.
    """

    store: EmbeddingStore
    objects: Table
    categories: list[dict]
    train: np.ndarray
    held_out: np.ndarray

    @classmethod
    def open(cls, path: Path, *, annotations: Path | None, partial: bool, held_out: float, seed: int) -> "CachedData":
        """Raises StoreError for a store with uncommitted shards, unless `partial`."""
        store = EmbeddingStore.open(path)
        if (missing := len(store.uncommitted())) and not partial:
            raise StoreError(
                f"{path}: {missing} of {len(store.shards())} shards are not committed; run the same "
                "`samcache embed` again to finish it, or use what is there with --partial"
            )
        if annotations is None:
            objects, categories = store.objects(), store.object_attributes()["categories"]
        else:
            objects, categories = objects_from(annotations, store)
        images = store.images
        useful = (store.row_states[images.rows] == OK) & np.isin(images.rows, objects["row"])
        rows = images.rows[useful]
        apart = is_held_out(images.ids[useful], images.splits[useful], held_out, seed)
        return cls(store, objects, categories, rows[~apart], rows[apart])

    @property
    def rows(self) -> np.ndarray:
        """All readable rows with objects, in store order."""
        return np.sort(np.concatenate([self.train, self.held_out]))

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing(**self.store.spec.preprocessing)

    def annotator(self, resolution: int, sampling: Sampling) -> Annotator:
        return Annotator(self.store.images, self.objects, self.preprocessing, resolution, sampling)

    @property
    def where(self) -> str:
        return str(self.store.path)

    @property
    def style(self) -> str:
        return "lvis" if (self.store.object_attributes()["dataset"] or {}).get("dataset") == "lvis" else "coco"

    @cached_property
    def _number_of(self) -> dict[int, int]:
        return {row: number for number, row in enumerate(self.store.images.rows.tolist())}

    def exams(
        self, rows: Sequence[int], kinds: Sequence[PromptMixture], seed: int, resolution: int
    ) -> Iterator[list[Exam]]:
        annotators = [self.annotator(resolution, Sampling(kind, seed, training=False)) for kind in kinds]
        for batch in read_rows(self.store, annotators[0], rows):
            row = int(batch.rows[0])
            rles = [self.objects["rle"][index] for index in batch.objects.tolist()]
            categories = self.objects["category"][batch.objects].tolist()
            exams = []
            for kind, annotator in zip(kinds, annotators, strict=True):
                if exams:
                    found = annotator.annotate([Visit(row)])
                    batch = replace(batch, prompts=found.prompts, targets=found.targets)
                image_id, geometry = annotator.image_id(row), annotator.geometry(row)
                exams.append(Exam(row, image_id, kind, geometry, batch, rles, categories))
            yield exams

    def categories_of(self, rows: np.ndarray) -> list[np.ndarray]:
        asked = ~self.objects["iscrowd"] & (self.objects["area"] > 0)
        by_row: dict[int, list[int]] = {row: [] for row in rows.tolist()}
        for row, category in zip(self.objects["row"][asked].tolist(), self.objects["category"][asked], strict=True):
            if row in by_row:
                by_row[row].append(category)
        return [np.array(found, np.int64) for found in by_row.values()]

    def ground_truth(self, rows: np.ndarray) -> dict:
        images, objects = self.store.images, self.objects
        ids, sizes = images.ids.tolist(), list(zip(images.heights.tolist(), images.widths.tolist(), strict=True))
        numbers = [self._number_of[int(row)] for row in rows]
        annotations = []
        for index in np.flatnonzero(np.isin(objects["row"], rows)).tolist():
            number = self._number_of[int(objects["row"][index])]
            of_object = (objects[name][index] for name in ("category", "box_xywh_image", "area", "iscrowd", "rle"))
            annotations.append(coco_annotation(index + 1, ids[number], *of_object, sizes[number]))
        return {
            "images": [coco_image(ids[number], *sizes[number]) for number in numbers],
            "categories": self.categories,
            "annotations": annotations,
        }

    def report_problems(self) -> None:
        """Nothing: what could not be read was never embedded."""

    def picture(self, row: int) -> np.ndarray:
        return self._pictures.image(row)

    @cached_property
    def _pictures(self) -> Pictures:
        return Pictures(self.store)

    def names(self, rows: np.ndarray) -> list[str]:
        """What images are called in any store that holds them: id and path."""
        images, number_of = self.store.images, self._number_of
        return [f"{images.ids[number_of[row]]} {images.paths[number_of[row]]}" for row in rows.tolist()]

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
        names, everything = np.array(self.names(self.rows)), self.rows
        apart = np.isin(names, held_out) if np.isin(names, held_out).any() else ~np.isin(names, trained)
        return replace(self, train=everything[~apart], held_out=everything[apart])


def objects_from(annotations: Path, store: EmbeddingStore) -> tuple[Table, list[dict]]:
    """Objects of another annotation file for the store's images, matched by image id; and its categories.

    Raises DatasetError where no image matches; images of another size are left out, and said.
    """
    dataset, images = open_annotations(annotations), store.images
    place = {int(image_id): number for number, image_id in enumerate(images.ids)}
    pairs, misfits = [], []
    for number, record in enumerate(dataset.images):
        if (image := place.get(record.id)) is None:
            continue
        if (record.height, record.width) != (images.heights[image], images.widths[image]):
            misfits.append(f"{annotations}: {record.path} has another size than in {store.path}")
        else:
            pairs.append((number, int(images.rows[image])))
    if not pairs:
        raise DatasetError(
            f"{annotations}: none of its {len(dataset.images)} image ids is in {store.path}; "
            "use the annotations of the images that were embedded"
        )
    with Bar("reading annotations", len(pairs), "images") as bar:
        table = object_columns(dataset, pairs, bar.advance)
    say_some("skipped", misfits + dataset.problems)
    return table, dataset.list_categories()
