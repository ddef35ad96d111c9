"""How opening a store, and the first batch from it, grow with its rows.

    python benchmarks/opening.py [--rows 1000 10000 100000 1000000 10000000] [--rounds 3]

About eight minutes, most of them for 10^7 rows, which take 9 GB of memory.

Every store is simulated but real: metadata, images, objects (one an image) and ledger are written by the store's own
functions, the rows of one shard too, and every further shard is another name of that file. So each row can be read
and verified, and 10^7 of them fit on a disk. Rows are small (4x8x8): how fast large ones are read is in `read.py`.

Each opening is a fresh process that has imported everything first. `open` is `EmbeddingStore.open`; `first_batch` goes
on to what `samcache train-top` does before its first step: objects, who is held out, an order, prompts and masks of 8
images. Memory is what is resident more than after the imports, and `peak` its highest so far. `single` opens the same
store before its records were compacted, as an interrupted `embed` leaves it: a JSON file per shard.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from measure import describe_machine, table, write_results

from sam_cache.batches import Preprocessing, object_columns
from sam_cache.data.synthetic import open_synthetic
from sam_cache.store import EmbeddingStore, LevelSpec, Ragged, StoreSpec, Table
from sam_cache.store.layout import shard_path
from sam_cache.store.ledger import read_ledger, seal
from sam_cache.store.prepare import create
from sam_cache.store.row_index import RowIndex
from sam_cache.store.shard_records import write_compaction
from sam_cache.types import ImageRecord

LINKS = 60_000  # names that one file may have; ext4 allows 65,000
SINGLE_UP_TO = 1_000_000  # rows: ten million would be 156,250 records
BATCH = 8
TARGET = {"rows": 1_000_000, "open_s": 1.0, "open_mb": 200.0, "first_batch_s": 3.0}


class Images(Sequence):
    """As many images as asked for, made when they are looked at: a list of 10^7 records would be gigabytes."""

    def __init__(self, like: ImageRecord, count: int):
        self.like, self.count = like, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> ImageRecord:
        return ImageRecord(number, f"train/{number:012d}.jpg", self.like.height, self.like.width, "train")

    def __iter__(self) -> Iterator[ImageRecord]:
        return map(self.__getitem__, range(self.count))


def repeat_object(scenes, count: int) -> Table:
    """The first object of a scene, once on each of `count` rows."""
    one = object_columns(scenes, [(0, 0)])
    columns: Table = {
        name: Ragged(np.tile(column.data[: column.offsets[1]], count), np.arange(count + 1) * column.offsets[1])
        if isinstance(column, Ragged)
        else np.repeat(column[:1], count, axis=0)
        for name, column in one.items()
    }
    return columns | {"row": np.arange(count)}


def simulate(path: Path, rows: int, compact: bool) -> None:
    """Write a store of which every row is committed."""
    scenes = open_synthetic(1)
    spec = StoreSpec("none", "00" * 32, {"neck": LevelSpec(4, 8, 8, "fp16")}, "fp32", vars(Preprocessing(1024)))
    attributes = {"categories": scenes.categories}
    images = Images(scenes.images[0], rows)
    create(path, spec, images, repeat_object(scenes, rows), b"none", {}, attributes)
    store = EmbeddingStore.open(path)
    with store.writing(store.shards()[0]) as writer:
        for row in store.shards()[0].rows:
            value = np.random.default_rng(row).standard_normal((4, 8, 8), np.float32)
            writer.append(row, {"neck": value}, content=f"{row:064x}")
    record_path = path / "ledger" / "shard-000000.json"
    record, digest = json.loads(record_path.read_bytes()), read_ledger(path).prepares[0]["digest"]
    del record["digest"]
    index = RowIndex(spec.arrays, len(store.shards()), spec.shard_rows)
    draw, source = np.random.default_rng(0), path / shard_path("neck", 0)
    for shard in store.shards():
        target = path / shard_path("neck", shard.index)
        if shard.index:
            target.parent.mkdir(parents=True)
            if shard.index % LINKS:
                os.link(source, target)
            else:
                target.write_bytes(source.read_bytes())
                source = target
        drawn = draw.bytes(32 * spec.shard_rows).hex()
        contents = [drawn[first : first + 64] for first in range(0, len(drawn), 64)]
        each = record | {"key": shard.index, "contents": contents}
        if not compact:
            record_path.with_name(f"shard-{shard.index:06d}.json").write_bytes(seal(each))
        index.add(each)
    if compact:
        write_compaction(path, index, digest)
        record_path.unlink()


def resident() -> float:
    """MB in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # see proc_pid_clear_refs(5)


def peak() -> float:
    """MB that were in memory at most since `forget_peak`."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024 / 1e6


def open_once(path: Path) -> dict[str, float]:
    """In the fresh process: seconds, and MB beyond the imports."""
    from sam_cache.batches import Annotator, CachedBatches, Order, Sampling
    from sam_cache.data import parse_prompts
    from sam_cache.stages.cached_data import CachedData

    forget_peak()
    before, started = resident(), time.perf_counter()
    store = EmbeddingStore.open(path)
    opened = time.perf_counter()
    found = {"open_s": opened - started, "open_mb": resident() - before, "open_peak_mb": peak() - before}
    del store
    started = time.perf_counter()
    data = CachedData.open(path, annotations=None, partial=False, held_out=0.1, seed=0)
    sampling = Sampling(parse_prompts("box"), seed=0, training=True)
    annotator = Annotator(data.store.images, data.objects, Preprocessing(1024), 256, sampling)
    batches = iter(CachedBatches(data.store, annotator, Order(data.train, seed=0), batch_size=BATCH))
    batch = next(batches)
    found |= {"first_batch_s": time.perf_counter() - started, "first_batch_mb": resident() - before}
    found |= {"first_batch_peak_mb": peak() - before}
    if len(batch.levels["neck"]) != BATCH:
        raise AssertionError("not the batch that was asked for")
    batches.close()
    return found


def open_in_fresh_process(path: Path) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, "--open", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measure(folder: Path, rows: int, compact: bool, rounds: int) -> dict[str, float]:
    """Medians over the rounds, after one that reads the files for the first time."""
    path = folder / f"{rows}-{'compact' if compact else 'single'}.zarr"
    started = time.perf_counter()
    simulate(path, rows, compact)
    made = time.perf_counter() - started
    found = [open_in_fresh_process(path) for _ in range(rounds + 1)][1:]
    medians = {name: statistics.median(each[name] for each in found) for name in found[0]}
    print(f"{rows:10,} rows, {'compact' if compact else 'single'}: made in {made:.0f} s; {medians}", flush=True)
    return {"rows": rows, **medians}


def render(result: dict) -> str:
    """How opening grows, as a table, and what the target asks."""

    def cells(row: dict) -> list[str]:
        return [
            f"{row['rows']:,}",
            *(f"{row[f'{what}_s']:.2f} s" for what in ("open", "first_batch")),
            *(f"{row[f'{what}_mb']:.0f} MB" for what in ("open", "open_peak", "first_batch")),
        ]

    singles = {row["rows"]: f"{row['open_s']:.2f} s" for row in result["single"]}
    rows = [[*cells(row), singles.get(row["rows"], "")] for row in result["compact"]]
    head = ["rows", "opened in", "first batch in", "opened: memory", "its peak", "first batch: memory", "not compacted"]
    lines = [table(head, rows)]
    if found := [row for row in result["compact"] if row["rows"] == TARGET["rows"]]:
        one = found[0]
        lines.append(
            f"{TARGET['rows']:,} rows: opened in {one['open_s']:.2f} s (target: {TARGET['open_s']:.0f} s) with "
            f"{one['open_mb']:.0f} MB (target: {TARGET['open_mb']:.0f} MB), the first batch "
            f"{one['first_batch_s']:.2f} s after the imports (target: {TARGET['first_batch_s']:.0f} s)."
        )
    return "\n\n".join(lines)


def draw(result: dict) -> Figure:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    seconds, memory = figure.subplots(1, 2)
    rows = [row["rows"] for row in result["compact"]]
    for axes, unit in ((seconds, "s"), (memory, "mb")):
        for what, label in (("open", "opened"), ("first_batch", "first batch")):
            axes.plot(rows, [max(row[f"{what}_{unit}"], 1e-3) for row in result["compact"]], "o-", label=label)
        axes.set(xscale="log", yscale="log", xlabel="rows")
    single = result["single"]
    seconds.plot([row["rows"] for row in single], [row["open_s"] for row in single], "s--", label="not compacted")
    seconds.set_ylabel("seconds")
    memory.set_ylabel("MB beyond imports")
    seconds.legend()
    memory.legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10**power for power in range(3, 8)])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.open:
        print(json.dumps(open_once(options.open)))
        return
    result: dict[str, object] = {"compact": [], "single": []}
    for rows in options.rows:
        for kind in ("compact", "single"):
            if kind == "compact" or rows <= SINGLE_UP_TO:
                with tempfile.TemporaryDirectory() as folder:
                    result[kind].append(measure(Path(folder), rows, kind == "compact", options.rounds))
    settings = {"rounds": options.rounds, "batch": BATCH, "shard_rows": 64, "objects_per_image": 1}
    write_results("opening_cpu", result | {"settings": settings, "machine": describe_machine()})


if __name__ == "__main__":
    main()
