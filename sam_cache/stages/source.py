"""The dataset a stage is pointed at, and the one a store was made from."""

from pathlib import Path

import numpy as np

from sam_cache import config
from sam_cache.config import DatasetKnobs
from sam_cache.data import Dataset, decode, open_dataset
from sam_cache.errors import SamcacheError
from sam_cache.stages.progress import say
from sam_cache.store import EmbeddingStore


def open_source(cfg: DatasetKnobs) -> Dataset:
    """The dataset of the given knobs. Relative paths lie under --root where one is given."""
    return open_dataset(**dataset_arguments(cfg))


def dataset_arguments(cfg: DatasetKnobs) -> dict:
    def under_root(path: Path | None) -> Path | None:
        return path if path is None or cfg.root is None else cfg.root / path

    root = cfg.root
    if root is None and cfg.images is None and cfg.dataset != "synthetic":
        root = config.home() / "data" / cfg.dataset
    return {
        "kind": cfg.dataset,
        "root": root,
        "split": cfg.split,
        "images": under_root(cfg.images),
        "annotations": under_root(cfg.annotations),
        "masks": under_root(cfg.masks),
        "mask_pattern": cfg.mask_pattern,
        "objects_per": cfg.objects_per,
        "classes": cfg.classes,
        "ignore_values": cfg.ignore_values,
        "count": cfg.scenes,
        "seed": cfg.scene_seed,
        "limit": cfg.limit,
    }


class Pictures:
    """The images behind a store's rows, for people to look at; grey where the files are not at hand."""

    def __init__(self, store: EmbeddingStore):
        self._images = store.images
        self._intensity = store.spec.preprocessing["intensity"]
        self._records = {}
        knobs = store.object_attributes()["dataset"]  # of the newest images, and so of all
        if knobs is None:
            return say("overlays are drawn on grey: the store was made from a dataset given in Python")
        try:
            self._dataset = open_source(DatasetKnobs(**knobs))
            self._records = {record.id: record for record in self._dataset.images}
        except SamcacheError as error:
            say(f"overlays are drawn on grey: {error}")

    def image(self, row: int) -> np.ndarray:
        """uint8 RGB (H, W, 3) at the size the store knows."""
        number = int(np.flatnonzero(self._images.rows == row)[0])
        record = self._records.get(int(self._images.ids[number]))
        if record is not None:
            try:
                return decode(self._dataset.read(record), record, self._intensity).image
            except SamcacheError as error:
                say(f"overlay of row {row} is drawn on grey: {error}")
        return np.full((self._images.heights[number], self._images.widths[number], 3), 96, np.uint8)
