"""Stage 1: run the frozen image encoder once over every image of a dataset, into a store."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial

import torch

from sam_cache.batches import PixelBatch, Preprocessing, pixel_batches
from sam_cache.config import EmbedConfig
from sam_cache.data import Dataset, View, parse_views
from sam_cache.model import load_encoder, size_of
from sam_cache.ranks import Ranks
from sam_cache.stages.device import pick_device, pick_precision
from sam_cache.stages.embedding_store import check_space, checkpoint_of, open_store, recorded, spec_of
from sam_cache.stages.encoding import Encoded, Encoding, compile_encoder, wants_compiling
from sam_cache.stages.progress import Bar, say, say_some, stop_on_signals
from sam_cache.stages.shard_writing import OpenShards, WritingThread
from sam_cache.stages.source import open_source
from sam_cache.store import FAILED, OK, EmbeddingStore, Shard, ShardBusy

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def embed(cfg: EmbedConfig, dataset: Dataset | None = None) -> int:
    """Embed what the store does not hold yet; returns 1 under --strict when an image was skipped, else 0.

    `dataset` stands in for the one that `cfg` describes: for data in a format of your own.
    Raises Interrupted when asked to stop: committed shards stay, the rows of the open one are kept,
    and the same command goes on from there.
    """
    views = parse_views(cfg.views)
    ranks = Ranks.from_env()
    device = pick_device(cfg.device, ranks)
    precision = pick_precision(cfg.compute_dtype, device, "--compute-dtype")
    source = dataset or open_source(cfg)
    for note in source.notes:
        say(note)
    size = size_of(cfg.model).at(cfg.input_size)
    how = Preprocessing(size.input_size, cfg.fit, cfg.normalise, cfg.resize, cfg.intensity)
    encoder = load_encoder(cfg.model, checkpoint_of(cfg), cfg.input_size, cfg.normalise, cfg.levels)
    encoder.to(device, DTYPES[precision])
    if checkpoint_of(cfg) is None and not size.packaged:
        say(f"{cfg.model}: weights drawn from a fixed seed, it knows nothing of the world yet")
    spec = spec_of(cfg, encoder, how, precision)
    known = EmbeddingStore.open(cfg.store) if cfg.store.exists() else None
    rows = sum(views.count(record.height, record.width) for record in source.images)
    compiling = wants_compiling(cfg.compile, device, rows // ranks.world)
    # Before the list below, which may not fit the memory.
    check_space(cfg.store, spec, len(source.images), rows, held=len(known.images) if known else 0)
    # All views of the first image, then all of the second: the order of the rows.
    shown = [(number, view) for number, record in enumerate(source.images) for view in views.of(record)]
    attributes = known.object_attributes() if known else {}
    store = open_store(cfg, source, shown, spec, recorded(cfg, dataset is None), attributes)

    # Under --limit the store may hold more images than are asked for now.
    asked = dict(zip(store.images.rows.tolist(), shown, strict=False))
    todo = [shard for shard in store.uncommitted() if shard.rows[-1] in asked]
    batch_size = cfg.batch_size or (8 if device.type == "cuda" else 1)
    if compiling and todo:
        compile_encoder(encoder, batch_size, device)
    quantised = {name for name, level in spec.levels.items() if level.dtype == "int8"}
    encoding = Encoding(encoder, device, batch_size, quantised)
    threads = cfg.threads or threads_beside(device)
    with Bar("embedding", sum(len(shard.rows) for shard in todo), "images") as bar:
        notes = fill(store, ranks.share(todo), source, asked, how, encoding, threads, bar)
    store.compact()
    return report(cfg, store, source, notes, done=len(todo))


def threads_beside(device: torch.device) -> int:
    """Threads that decode while the encoder runs: one for each core beside a GPU, and none on a CPU.

    There the encoder's own threads fill the cores, and each of its layers would wait for whatever ran beside it.
    """
    return 0 if device.type == "cpu" else os.cpu_count() or 1


def fill(
    store: EmbeddingStore,
    shards: Iterable[Shard],
    source: Dataset,
    asked: Mapping[int, tuple[int, View]],
    how: Preprocessing,
    encoding: Encoding,
    threads: int,
    bar: Bar,
) -> Counter[str]:
    """Embed the rows that these shards lack; `asked` has each row's image number and view. Returns what was noted.

    Decoding, encoding and writing go on side by side: the encoder waits for neither. With 0 `threads` all is done
    in turn. Raises Interrupted.
    """
    notes: Counter[str] = Counter()
    writing = WritingThread(ahead=2 if threads else 0)
    with stop_on_signals() as stop, OpenShards(store) as open_shards, writing:

        def rows_to_embed() -> Iterator[tuple[int, int]]:
            """Image number and row, shard after shard, so that nothing waits where one ends and the next begins."""
            for shard in shards:
                # A shard that another process is writing is that process's; its own record will tell.
                with suppress(ShardBusy):
                    rows = open_shards.open(shard)
                    bar.advance(len(shard.rows) - len(rows))
                    if not rows:
                        writing.give(partial(open_shards.commit, shard.index))
                    yield from ((asked[row][0], row) for row in rows)

        def write(batch: PixelBatch, encoded: Encoded) -> None:
            with encoding.fetched(encoded) as levels:
                for place, row in enumerate(batch.rows):
                    values = {name: level[place] for name, level in levels.items()}
                    open_shards.append(row, values, batch.hashes[place])
            for row, message in batch.failures.items():
                open_shards.fail(row, message)
            bar.advance(len(batch.rows) + len(batch.failures))

        batches = pixel_batches(
            source, rows_to_embed(), how, encoding.batch_size, threads, lambda row: asked[row][1], encoding.pinned
        )
        for batch in batches:
            writing.give(partial(write, batch, encoding.encode(batch)))
            notes.update(batch.notes)
            if stop():
                writing.finish()
                stop.check(f"stopped; {store.path} keeps what is done, the same command goes on from there")
        writing.finish()
    return notes


def report(cfg: EmbedConfig, store: EmbeddingStore, dataset: Dataset, notes: Counter, done: int) -> int:
    """Say what came of it, most important last."""
    states = store.row_states[store.images.rows]
    for note, count in notes.most_common():
        say(f"{count} images: {note}")
    say_some("skipped", dataset.problems)
    say_some("failed", [f"row {row}: {message}" for row, message in store.failures()])
    moved = store.objects()["centroid_moved"]
    if len(moved):
        say(f"{len(moved)} objects; {moved.mean():.1%} of the centroids fell outside their mask and were moved")
    counts = store.object_attributes().get("views", {})
    for kind, count in counts.items():
        say(
            f"{kind}: {count['rows']} rows with {count['objects']} objects, {count['clipped']} of them cut off "
            f"at the border; {count['dropped']} not in sight and left out"
        )
    names = store.images.views[store.images.heights > 0]
    if "identity" in counts and (twice := (names == "tile/0").sum() - (names == "tile/1").sum()):
        say(f"tile: {twice} images are no larger than a tile, so their only tile is the image once more")
    what = "up to date" if not done else "done"
    say(
        f"{cfg.store}: {what}, {(states == OK).sum()} of {len(states)} {'views' if counts else 'images'} embedded, "
        f"{(states == FAILED).sum()} failed"
        + ("; try these again with `samcache verify --retry-failed`, then embed" if (states == FAILED).any() else "")
    )
    return 1 if cfg.strict and (states == FAILED).any() else 0
