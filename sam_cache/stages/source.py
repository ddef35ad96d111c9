"""The dataset a stage is pointed at, and the one a store was made from."""

from pathlib import Path

import numpy as np

from sam_cache import config
from sam_cache.config import DatasetKnobs
from sam_cache.data import WHOLE, Dataset, Pair, decode, open_dataset, parse_pair, parse_views
from sam_cache.errors import SamcacheError, UsageError
from sam_cache.stages.progress import say
from sam_cache.store import EmbeddingStore

FOR_PAIRS_ALONE = ("pairs", "val_pairs", "mask_maximum")
NOT_FOR_PAIRS = ("split", "images", "annotations", "masks", "objects_per", "classes", "ignore_values")


def open_source(cfg: DatasetKnobs) -> Dataset:
    """The dataset of the given knobs. Relative paths lie under --root where one is given."""
    return open_dataset(**dataset_arguments(cfg))


def dataset_arguments(cfg: DatasetKnobs) -> dict:
    def under_root(path: Path | None) -> Path | None:
        return path if path is None or cfg.root is None else cfg.root / path

    root = cfg.root
    if root is None and cfg.images is None and cfg.dataset not in ("pairs", "synthetic"):
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
        "pairs": pairs_of(cfg),
        "mask_maximum": cfg.mask_maximum,
        "count": cfg.scenes,
        "seed": cfg.scene_seed,
        "limit": cfg.limit,
    }


def pairs_of(cfg: DatasetKnobs) -> list[Pair]:
    """The sets of --pairs and then those of --val-pairs. Raises UsageError where an entry or its company is wrong."""
    _refuse_flags_without_effect(cfg)
    pairs = [parse_pair(text, "train", cfg.root) for text in cfg.pairs or ()]
    pairs += [parse_pair(text, "val", cfg.root) for text in cfg.val_pairs or ()]
    return pairs


def _refuse_flags_without_effect(cfg: DatasetKnobs) -> None:
    is_pairs = cfg.dataset == "pairs"
    for name in NOT_FOR_PAIRS if is_pairs else FOR_PAIRS_ALONE:
        value = getattr(cfg, name)
        if value == DatasetKnobs.model_fields[name].default:
            continue
        given = ",".join(map(str, value)) if isinstance(value, tuple) else value
        raise UsageError(
            f"--{name.replace('_', '-')} {given}: "
            + (
                "has no effect on --dataset pairs; leave it, --pairs and --val-pairs name all that is read"
                if is_pairs
                else f"is for --dataset pairs, not {cfg.dataset}; say that, or leave it"
            )
        )


def where_of(cfg: DatasetKnobs) -> str:
    """What a person calls the dataset: its format, and its folder or the names of its sets."""
    if cfg.dataset == "pairs":
        return f"pairs {', '.join(pair.split for pair in pairs_of(cfg))}"
    return f"{cfg.dataset} {cfg.images or cfg.root or ''}".strip()


class Pictures:
    """The images behind a store's rows, for people to look at; grey where the files are not at hand."""

    def __init__(self, store: EmbeddingStore):
        self._images, self._views = store.images, parse_views(store.spec.views)
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
        """What a row shows: uint8 RGB (H, W, 3) at the size the store knows."""
        number = int(np.flatnonzero(self._images.rows == row)[0])
        size = int(self._images.heights[number]), int(self._images.widths[number])
        return self._draw(row, str(self._images.views[number]), size)

    def whole(self, row: int, size: tuple[int, int]) -> np.ndarray:
        """The image, of `size` (rows, columns), whatever the row shows of it."""
        return self._draw(row, "identity", size)

    def _draw(self, row: int, view: str, size: tuple[int, int]) -> np.ndarray:
        number = int(np.flatnonzero(self._images.rows == row)[0])
        record = self._records.get(int(self._images.ids[number]))
        if record is not None:
            try:
                image = decode(self._dataset.read(record), record, self._intensity).image
                shown = next((shown for shown in self._views.of(record) if shown.name == view), WHOLE)
                return shown.show(image)
            except SamcacheError as error:
                say(f"overlay of row {row} is drawn on grey: {error}")
        return np.full((*size, 3), 96, np.uint8)
