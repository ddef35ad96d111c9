"""Opening the store that embed fills: its identity, its room on the disk, what is noted beside."""

import json
import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from sam_cache import config
from sam_cache.batches import Preprocessing, ViewCount, object_columns
from sam_cache.config import DatasetKnobs, EmbedConfig, ModelKnobs
from sam_cache.data import Dataset, View, Views, parse_views
from sam_cache.errors import StoreError, UsageError
from sam_cache.model import Encoder, load_top, size_of, top_to_bytes
from sam_cache.stages.progress import Bar, say
from sam_cache.store import STORED_TYPES, EmbeddingStore, LevelSpec, StoreSpec, Table
from sam_cache.types import ImageRecord


def checkpoint_of(cfg: ModelKnobs) -> Path | None:
    """The weights file asked for, else the official one under $SAMCACHE_HOME; None for models without."""
    official = size_of(cfg.model).checkpoint
    if cfg.checkpoint is not None or not official:
        return cfg.checkpoint
    return config.home() / "checkpoints" / official


def spec_of(cfg: EmbedConfig, encoder: Encoder, how: Preprocessing, precision: str) -> StoreSpec:
    """The identity of the store asked for."""
    if cfg.early_dtype and "early" not in encoder.levels:
        raise UsageError(f"--early-dtype {cfg.early_dtype}: no early level is stored; add --levels neck,early")
    dtypes = {"neck": cfg.dtype, "early": cfg.early_dtype or cfg.dtype}
    kept = {name: keep_bits_of(cfg, dtypes[name]) for name in encoder.levels}
    if cfg.keep_bits and not any(kept.values()):
        raise UsageError(
            f"--keep-bits {cfg.keep_bits}: int8 has no mantissa to cut; leave it, or choose --dtype fp16, bf16 or fp32"
        )
    levels = {name: LevelSpec(*shape, dtypes[name], cfg.codec, kept[name]) for name, shape in encoder.levels.items()}
    views = str(parse_views(cfg.views))
    return StoreSpec(cfg.model, encoder.digest, levels, precision, vars(how), cfg.shard_rows, views)


def open_store(
    cfg: EmbedConfig,
    dataset: Dataset,
    shown: Sequence[tuple[int, View]],
    spec: StoreSpec,
    recorded: dict,
    known: dict,
) -> EmbeddingStore:
    """Create the store, or check that the one there is of the same identity, and prepare new images.

    `shown` are the rows: a number of the dataset's images, and which view of it. `known` are the attributes of
    the objects in the store that is there, {} without one.
    """
    attributes: dict = {}

    def prepare(records: Sequence[ImageRecord]) -> Table:
        new = shown[len(shown) - len(records) :]
        counts = {kind: ViewCount(**count) for kind, count in known.get("views", {}).items()}
        with Bar("reading objects", len(new), "images") as bar:
            pairs = ((number, row) for row, (number, _) in enumerate(new))
            table = object_columns(dataset, pairs, bar.advance, lambda row: new[row][1], counts)
        if parse_views(cfg.views) != Views(identity=True):
            attributes["views"] = {kind: asdict(count) for kind, count in counts.items()}
        # Class-index masks name their categories as they are read, so those read before count too.
        named = {category["id"]: category for category in known.get("categories", []) + dataset.list_categories()}
        attributes["categories"] = [named[id] for id in sorted(named)]
        attributes["skipped"] = dataset.problems
        attributes["dataset"] = recorded["dataset"]
        return table

    base = top_to_bytes(load_top(cfg.model, checkpoint_of(cfg), cfg.input_size))
    records = [view.record(dataset.images[number]) for number, view in shown]
    return EmbeddingStore.create_or_resume(cfg.store, spec, records, prepare, base, recorded, attributes)


def keep_bits_of(cfg: EmbedConfig, dtype: str) -> int | None:
    """Bits of the mantissa to keep in a level of this type: int8 beside a floating level has none to cut."""
    have = STORED_TYPES[dtype].mantissa
    if cfg.keep_bits and have and cfg.keep_bits > have:
        raise UsageError(f"--keep-bits {cfg.keep_bits}: {dtype} has {have} bits of mantissa; give at most {have}")
    return cfg.keep_bits if have else None


def recorded(cfg: EmbedConfig, described: bool) -> dict:
    """What is written beside the identity and never compared: where the images are, and what made the store."""
    knobs = DatasetKnobs(**{name: getattr(cfg, name) for name in DatasetKnobs.model_fields})
    return {
        "dataset": json.loads(config.with_absolute_paths(knobs).model_dump_json()) if described else None,
        "versions": {name: version(name) for name in ("samcache", "torch", "zarr", "numpy", "opencv-python")},
        "machine": platform.platform(),
    }


def check_space(path: Path, spec: StoreSpec, images: int, rows: int, held: int) -> None:
    """Say what a new store will take; `held` are the rows of an old one.

    Raises StoreError when the disk cannot hold it, or what it grows by.
    """
    size = max(0, rows - held) * sum(spec.row_bytes.values())
    parent = next(folder for folder in path.resolve().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    what = f"{images} images" + (f" in {rows} views" if rows != images else "")
    if not held:
        say(f"{what} -> {path}: up to {size / 2**30:.2f} GiB of embeddings; {free / 2**30:.0f} GiB free")
    if size > free:
        raise StoreError(
            f"{path}: {what} need {size / 2**30:.1f} GiB{' more' if held else ''} but {parent} has "
            f"{free / 2**30:.1f} GiB free; choose another --store, fewer --views, or fewer images with --limit"
        )
