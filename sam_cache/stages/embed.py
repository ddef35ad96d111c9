"""Stage 1: run the frozen image encoder once over every image of a dataset, into a store."""

import json
import platform
import shutil
from collections import Counter
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch

from sam_cache import config
from sam_cache.batches import PixelBatch, Preprocessing, object_columns, pixel_batches
from sam_cache.config import DatasetKnobs, EmbedConfig
from sam_cache.data import Dataset
from sam_cache.errors import StoreError
from sam_cache.model import Encoder, load_encoder, load_top, size_of, top_to_bytes
from sam_cache.ranks import Ranks
from sam_cache.stages.device import pick_device, pick_precision
from sam_cache.stages.progress import Bar, say, stop_on_signals
from sam_cache.stages.source import open_source
from sam_cache.store import FAILED, OK, EmbeddingStore, LevelSpec, ShardBusy, StoreSpec, Table

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def embed(cfg: EmbedConfig, dataset: Dataset | None = None) -> int:
    """Embed what the store does not hold yet; returns 1 under --strict when an image was skipped, else 0.

    `dataset` stands in for the one that `cfg` describes: for data in a format of your own.
    Raises Interrupted when asked to stop: committed shards stay, the rows of the open one are kept,
    and the same command goes on from there.
    """
    ranks = Ranks.from_env()
    device = pick_device(cfg.device, ranks)
    precision = pick_precision(cfg.compute_dtype, device, "--compute-dtype")
    source = dataset or open_source(cfg)
    for note in source.notes:
        say(note)
    size = size_of(cfg.model).at(cfg.input_size)
    how = Preprocessing(size.input_size, cfg.fit, cfg.normalise, cfg.resize, cfg.intensity)
    encoder = load_encoder(cfg.model, checkpoint_of(cfg), cfg.input_size, cfg.normalise)
    encoder.to(device, DTYPES[precision])
    if not size.checkpoint:
        say(f"{cfg.model}: {size.origin}; no pretrained knowledge is in them")
    store = open_store(cfg, source, encoder, how, precision, recorded(cfg, dataset is None))

    todo = store.uncommitted()
    number_of = {row: number for number, row in enumerate(store.images.rows.tolist())}
    notes: Counter[str] = Counter()
    with stop_on_signals() as stop, Bar("embedding", sum(len(shard.rows) for shard in todo), "images") as bar:
        for shard in ranks.share(todo):
            # A shard that another process is writing is that process's; its own record will tell.
            with suppress(ShardBusy), store.writing(shard) as writer:
                pairs = [(number_of[row], row) for row in shard.rows if row not in writer.kept]
                bar.advance(len(shard.rows) - len(pairs))
                for batch in pixel_batches(source, pairs, how, cfg.batch_size, cfg.threads):
                    levels = encode(encoder, batch, device)
                    for place, row in enumerate(batch.rows):
                        writer.append(row, {name: level[place] for name, level in levels.items()}, batch.hashes[place])
                    for row, message in batch.failures.items():
                        writer.fail(row, message)
                    notes.update(batch.notes)
                    bar.advance(len(batch.rows) + len(batch.failures))
                    stop.check(f"stopped; {cfg.store} keeps what is done, the same command goes on from there")
    store.compact()
    return report(cfg, store, source, notes, done=len(todo))


@torch.inference_mode()
def encode(encoder: Encoder, batch: PixelBatch, device: torch.device) -> dict[str, torch.Tensor]:
    """Levels of the batch's images, on the CPU. uint8 travels to the device and is normalised there."""
    if not batch.rows:
        return {}
    levels = encoder(batch.pixels.to(device, non_blocking=True), batch.content_hw.to(device))
    return {name: level.cpu() for name, level in levels.items()}


def checkpoint_of(cfg: EmbedConfig) -> Path | None:
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

    def prepare(records) -> Table:
        first = len(dataset.images) - len(records)
        with Bar("reading objects", len(records), "images") as bar:
            return object_columns(dataset, ((first + row, row) for row in range(len(records))), bar.advance)

    categories = [{"id": id, "name": name} for id, name in sorted(dataset.categories.items())]
    base = top_to_bytes(load_top(cfg.model, checkpoint_of(cfg), cfg.input_size))
    return EmbeddingStore.create_or_resume(
        cfg.store, spec, dataset.images, prepare, base, recorded, {"categories": categories}
    )


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


def report(cfg: EmbedConfig, store: EmbeddingStore, dataset: Dataset, notes: Counter, done: int) -> int:
    """Say what came of it, most important last."""
    states = store.row_states[store.images.rows]
    for note, count in notes.most_common():
        say(f"{count} images: {note}")
    for problem in dataset.problems[:20]:
        say(f"skipped: {problem}")
    if len(dataset.problems) > 20:
        say(f"... and {len(dataset.problems) - 20} more annotations")
    failures = store.failures()
    for row, message in failures[:20]:
        say(f"row {row} failed: {message}")
    if len(failures) > 20:
        say(f"... and {len(failures) - 20} more images; `samcache info --store {cfg.store}` lists them")
    moved = store.objects()["centroid_moved"]
    if len(moved):
        say(
            f"{len(moved)} objects; {moved.mean():.1%} of the centroids fell outside their mask and were moved"
        )
    what = "up to date" if not done else "done"
    say(
        f"{cfg.store}: {what}, {(states == OK).sum()} of {len(states)} images embedded, "
        f"{(states == FAILED).sum()} failed"
    )
    return 1 if cfg.strict and (states == FAILED).any() else 0
