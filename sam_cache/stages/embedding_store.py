"""Opening the store that embed fills: its identity, its room on the disk, what is noted beside."""

import json
import platform
import shutil
from importlib.metadata import version
from pathlib import Path

from sam_cache import config
from sam_cache.batches import Preprocessing, object_columns
from sam_cache.config import DatasetKnobs, EmbedConfig, ModelKnobs
from sam_cache.data import Dataset
from sam_cache.errors import StoreError
from sam_cache.model import Encoder, load_top, size_of, top_to_bytes
from sam_cache.stages.progress import Bar, say
from sam_cache.store import EmbeddingStore, LevelSpec, StoreSpec, Table


def checkpoint_of(cfg: ModelKnobs) -> Path | None:
    """The weights file asked for, else the official one under $SAMCACHE_HOME; None for models without."""
    official = size_of(cfg.model).checkpoint
    if cfg.checkpoint is not None or not official:
        return cfg.checkpoint
    return config.home() / "checkpoints" / official


def open_store(
    cfg: EmbedConfig, dataset: Dataset, encoder: Encoder, how: Preprocessing, precision: str, recorded: dict
) -> EmbeddingStore:
    """Create the store, or check that the one there is of the same identity, and prepare new images."""
    levels = {name: LevelSpec(*shape, cfg.dtype, cfg.codec) for name, shape in encoder.levels.items()}
    spec = StoreSpec(cfg.model, encoder.digest, levels, precision, vars(how), cfg.shard_rows)
    check_space(cfg.store, spec, len(dataset.images))

    attributes: dict = {}
    known = EmbeddingStore.open(cfg.store).object_attributes()["categories"] if cfg.store.exists() else []

    def prepare(records) -> Table:
        first = len(dataset.images) - len(records)
        with Bar("reading objects", len(records), "images") as bar:
            table = object_columns(dataset, ((first + row, row) for row in range(len(records))), bar.advance)
        # Class-index masks name their categories as they are read, so those read before count too.
        named = {category["id"]: category for category in known + dataset.list_categories()}
        attributes["categories"] = [named[id] for id in sorted(named)]
        attributes["skipped"] = dataset.problems
        attributes["dataset"] = recorded["dataset"]
        return table

    base = top_to_bytes(load_top(cfg.model, checkpoint_of(cfg), cfg.input_size))
    return EmbeddingStore.create_or_resume(cfg.store, spec, dataset.images, prepare, base, recorded, attributes)


def recorded(cfg: EmbedConfig, described: bool) -> dict:
    """What is written beside the identity and never compared: where the images are, and what made the store."""
    knobs = DatasetKnobs(**{name: getattr(cfg, name) for name in DatasetKnobs.model_fields})
    # With a root the other paths are relative to it, so it alone has to be found again from elsewhere.
    paths = ("root",) if cfg.root else ("images", "annotations", "masks")
    absolute = {name: path.resolve() for name in paths if (path := getattr(cfg, name))}
    return {
        "dataset": json.loads(knobs.model_copy(update=absolute).model_dump_json()) if described else None,
        "versions": {name: version(name) for name in ("samcache", "torch", "zarr", "numpy", "opencv-python")},
        "machine": platform.platform(),
    }


def check_space(path: Path, spec: StoreSpec, images: int) -> None:
    """Say what the store will take. Raises StoreError when the disk cannot hold it."""
    if path.exists():
        return
    size = images * sum(level.nbytes for level in spec.levels.values())
    parent = next(folder for folder in path.resolve().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    say(f"{images} images -> {path}: up to {size / 2**30:.2f} GiB of embeddings; {free / 2**30:.0f} GiB free")
    if size > free:
        raise StoreError(
            f"{path}: needs {size / 2**30:.1f} GiB but {parent} has {free / 2**30:.1f} GiB free; "
            "choose another --store, or fewer images with --limit"
        )
