"""What training and evaluation read: a store's embeddings, its objects or others, and who is held out."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sam_cache.batches import Annotator, Preprocessing, Sampling, is_held_out, object_columns
from sam_cache.data import open_annotations
from sam_cache.errors import DatasetError, StoreError
from sam_cache.stages.progress import Bar, say
from sam_cache.store import OK, EmbeddingStore, Table


@dataclass(frozen=True)
class CachedData:
    """An opened store with the objects to use, and its readable rows as `train` and `held_out`."""

    store: EmbeddingStore
    objects: Table
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
        objects = store.objects() if annotations is None else objects_from(annotations, store)
        images = store.images
        readable = store.row_states[images.rows] == OK
        apart = is_held_out(images.ids, images.splits, held_out, seed)
        return cls(store, objects, images.rows[readable & ~apart], images.rows[readable & apart])

    @property
    def rows(self) -> np.ndarray:
        """All readable rows, in store order."""
        return np.sort(np.concatenate([self.train, self.held_out]))

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing(**self.store.spec.preprocessing)

    def annotator(self, resolution: int, sampling: Sampling) -> Annotator:
        return Annotator(self.store.images, self.objects, self.preprocessing, resolution, sampling)

    def holding_out(self, rows: list[int]) -> "CachedData":
        """The same data with exactly `rows` held out, as a run recorded them."""
        apart = np.isin(self.rows, rows)
        return replace(self, train=self.rows[~apart], held_out=self.rows[apart])


def objects_from(annotations: Path, store: EmbeddingStore) -> Table:
    """Objects of another annotation file for the store's images, matched by image id.

    Raises DatasetError where no image matches; images of another size are left out, and said.
    """
    dataset, images = open_annotations(annotations), store.images
    place = {int(image_id): number for number, image_id in enumerate(images.ids)}
    pairs, misfits = [], []
    for number, record in enumerate(dataset.images):
        if (image := place.get(record.id)) is None:
            continue
        if (record.height, record.width) != (images.heights[image], images.widths[image]):
            misfits.append(record.path)
        else:
            pairs.append((number, int(images.rows[image])))
    if misfits:
        say(f"{annotations}: {len(misfits)} images have another size than in the store, left out: {misfits[0]}, ...")
    if not pairs:
        raise DatasetError(
            f"{annotations}: none of its {len(dataset.images)} image ids is in {store.path}; "
            "use the annotations of the images that were embedded"
        )
    with Bar("reading annotations", len(pairs), "images") as bar:
        return object_columns(dataset, pairs, bar.advance)
