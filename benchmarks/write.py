"""How fast whole shards are written, what that takes of memory, and what being safe costs.

    python benchmarks/write.py [--shards 4] [--shard-rows 64] [--rounds 5]

Random fp16 rows, from memory to files: our writer row by row, zarr-python and TensorStore a shard at a time into
arrays of the very same metadata (sharded, a crc32c per row), one `.npy` per row, and one bare file per shard, which
is what the disk allows. Each is run twice, with fsync and without: `_lazy` leaves the bytes to the page cache.
zarr-python never calls fsync, so in the first kind its files are synced when they are whole. It compares every row
with the fill value unless told otherwise: `zarr_python_default` does, `zarr_python` does not.

In every round each contender writes into a new folder; what it wrote before the first one was read back and
compared. Making folders and metadata is not counted. `vs_*` are how many times slower a contender was than our
writer. Memory is the peak of a fresh process over what it held before; the shard that zarr-python and TensorStore
must be handed whole is not counted.
"""

import argparse
import hashlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import google_crc32c
import numpy as np
import zarr
from measure import alternate, describe_machine, median_ratio, summarise, write_results
from read import versions

from sam_cache import durable
from sam_cache.store import EmbeddingStore, LevelSpec, StoreSpec
from sam_cache.store.codecs import to_stored
from sam_cache.store.layout import level_metadata
from sam_cache.types import ImageRecord

Written = tuple[Callable[[], object], Callable[[int], np.ndarray]]  # writes all shards; reads a row back


def ours(shards: list[np.ndarray], folder: Path, sync: bool) -> Written:
    shard_rows, *shape = shards[0].shape
    records = [ImageRecord(row, f"{row}.jpg", 1024, 1024) for row in range(len(shards) * shard_rows)]
    spec = StoreSpec("none", "00" * 32, {"neck": LevelSpec(*shape, "fp16")}, "fp32", {}, shard_rows)
    objects = {"row": np.zeros(0, np.int64)}
    store = EmbeddingStore.create_or_resume(folder / "store", spec, records, lambda _: objects, b"none", {}, {})

    def write() -> None:
        # No option of the store: it exists to tell what the disk makes it wait for.
        with nullcontext() if sync else patch("os.fsync", lambda descriptor: None):
            for shard, values in zip(store.uncommitted(), shards, strict=True):
                with store.writing(shard) as writer:
                    for row, value in zip(shard.rows, values, strict=True):
                        writer.append(row, {"neck": value}, content="00" * 32)

    def read(row: int) -> np.ndarray:
        reader = EmbeddingStore.open(store.path).reader()
        out = reader.empty(1)
        reader.read([row], out)
        return out["neck"][0].numpy()

    return write, read


def describe_array(shards: list[np.ndarray], folder: Path) -> tuple[Path, list[slice]]:
    """An array on disk without rows, described as our store describes it, and where each shard goes."""
    shard_rows, *shape = shards[0].shape
    metadata = level_metadata(LevelSpec(*shape, "fp16"), len(shards) * shard_rows, shard_rows)
    (folder / "zarr.json").write_bytes(metadata)
    return folder, [slice(first * shard_rows, (first + 1) * shard_rows) for first in range(len(shards))]


def zarr_python(shards: list[np.ndarray], folder: Path, sync: bool, write_empty_chunks: bool = True) -> Written:
    path, places = describe_array(shards, folder)
    with zarr.config.set({"array.write_empty_chunks": write_empty_chunks}):
        array = zarr.open_array(path, mode="r+")

    def write() -> None:
        for place, values in zip(places, shards, strict=True):
            array[place] = values
        if sync:
            durable.fsync_tree(path)

    return write, array.__getitem__


def zarr_python_default(shards: list[np.ndarray], folder: Path, sync: bool) -> Written:
    return zarr_python(shards, folder, sync, write_empty_chunks=False)


def tensorstore(shards: list[np.ndarray], folder: Path, sync: bool) -> Written:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # else its RPC library writes to stderr
    import tensorstore

    path, places = describe_array(shards, folder)
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(path)},
        "context": {"file_io_sync": sync},
    }
    array = tensorstore.open(spec, open=True, read=True, write=True).result()

    def write() -> None:
        for place, values in zip(places, shards, strict=True):
            array[place].write(values, can_reference_source_data_indefinitely=True).result()

    return write, lambda row: array[row].read().result()


def npy(shards: list[np.ndarray], folder: Path, sync: bool) -> Written:
    def write() -> None:
        for number, values in enumerate(shards):
            for row, value in enumerate(values, start=number * len(values)):
                with open(folder / f"{row}.npy", "wb") as file:
                    np.save(file, value)
                    file.flush()
                    if sync:
                        os.fsync(file.fileno())

    return write, lambda row: np.load(folder / f"{row}.npy")


def bare(shards: list[np.ndarray], folder: Path, sync: bool) -> Written:
    """The bytes of a shard into one file, and nothing else."""

    def write() -> None:
        for number, values in enumerate(shards):
            with open(folder / str(number), "wb", buffering=0) as file:
                for value in values:
                    file.write(value)
                if sync:
                    os.fsync(file.fileno())

    def read(row: int) -> np.ndarray:
        number, place = divmod(row, len(shards[0]))
        return np.fromfile(folder / str(number), np.float16).reshape(shards[0].shape)[place]

    return write, read


CONTENDERS = {each.__name__: each for each in (ours, zarr_python, zarr_python_default, tensorstore, npy, bare)}


def check(contender: Callable, shards: list[np.ndarray], folder: Path, sync: bool) -> None:
    write, read = contender(shards, folder, sync)
    write()
    rows = np.concatenate(shards)
    for row in (0, len(rows) // 2, len(rows) - 1):
        if not np.array_equal(read(row), rows[row]):
            raise AssertionError(f"{contender.__name__} did not write what it was given")


def write_anew(contender: Callable, shards: list[np.ndarray], root: Path, sync: bool, notes: list[float]) -> None:
    """Note the seconds of the writing alone, on a disk that owes nothing to those before."""
    with tempfile.TemporaryDirectory(dir=root) as folder:
        write, _ = contender(shards, Path(folder), sync)
        # A virtual machine's memory is slow when it is touched for the first time, and whose turn that is is chance.
        bare(shards, Path(folder).parent, sync=False)[0]()
        for number in range(len(shards)):
            Path(root, str(number)).unlink()
        os.sync()
        started = time.perf_counter()
        write()
        notes.append(time.perf_counter() - started)


def extra_memory(name: str, shape: tuple[int, ...], shards: int, root: Path) -> float:
    """MiB that writing takes at its peak; for a process of its own. Linux only."""
    with tempfile.TemporaryDirectory(dir=root) as folder:
        first, then = Path(folder, "first"), Path(folder, "then")
        first.mkdir()
        then.mkdir()
        CONTENDERS[name]([np.ones((2, 1, 64, 64), np.float16)], first, True)[0]()  # what libraries load when used
        write, _ = CONTENDERS[name]([np.ones(shape, np.float16)] * shards, then, True)
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        before = status_kib("VmRSS")
        write()
        return (status_kib("VmHWM") - before) / 1024


def status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def cost_per_row(shards: list[np.ndarray], rounds: int) -> dict[str, float]:
    """Milliseconds that each safety takes by itself for one row; fsync is measured on whole shards, see `main`."""
    rows = [row for values in shards for row in values]
    level = LevelSpec(*rows[0].shape, "fp16")
    works = {
        "crc32c": lambda row: google_crc32c.value(row.reshape(-1).view(np.uint8)),
        "sha256": lambda row: hashlib.sha256(row).digest(),
        "finite": lambda row: to_stored(row, "neck", level),
    }
    seconds = alternate({name: partial(each_of, work, rows) for name, work in works.items()}, rounds)
    return {name: statistics.median(times) / len(rows) * 1e3 for name, times in seconds.items()}


def each_of(work: Callable, rows: list[np.ndarray]) -> None:
    for row in rows:
        work(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=4, help="in each round")
    parser.add_argument("--shard-rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--channels", type=int, default=256, help="of 64x64 values each")
    options = parser.parse_args()
    shape = options.shard_rows, options.channels, 64, 64
    shards = [
        np.random.default_rng(number).standard_normal(shape, np.float32).astype(np.float16)
        for number in range(options.shards)
    ]
    with tempfile.TemporaryDirectory() as folder:
        runs, missing = {}, {}
        for name, contender in CONTENDERS.items():
            for suffix, sync in ("", True), ("_lazy", False):
                check_folder = Path(folder, "check")
                check_folder.mkdir()
                try:
                    check(contender, shards, check_folder, sync)
                    runs[name + suffix] = contender, sync
                except ImportError as error:
                    missing[name + suffix] = f"{type(error).__name__}: {error}"
                shutil.rmtree(check_folder)
        notes: dict[str, list[float]] = {name: [] for name in runs}
        alternate(
            {
                name: partial(write_anew, contender, shards, folder, sync, notes[name])
                for name, (contender, sync) in runs.items()
            },
            options.rounds,
        )
        costs = cost_per_row(shards, options.rounds)
        memory = {}
        for name in CONTENDERS:
            if name in runs:
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                    memory[name] = process.submit(extra_memory, name, shape, options.shards, folder).result()
    report(options, {name: times[1:] for name, times in notes.items()}, costs, memory, missing)


def report(options: argparse.Namespace, seconds: dict, costs: dict, memory: dict, missing: dict) -> None:
    rows = options.shards * options.shard_rows
    others = [name for name in CONTENDERS if name != "ours"]
    ratios = {
        f"{kind}vs_{name}": median_ratio(seconds, f"{name}{suffix}", f"ours{suffix}")
        if f"{name}{suffix}" in seconds
        else None
        for kind, suffix in (("", ""), ("lazy_", "_lazy"))
        for name in others
    }
    waited = [with_ - without for with_, without in zip(seconds["ours"], seconds["ours_lazy"], strict=True)]
    costs["fsync"] = statistics.median(waited) / rows * 1e3
    costs["whole"] = statistics.median(seconds["ours"]) / rows * 1e3
    rates = {
        name: {"rows_per_s": rows / median, "mb_per_s": rows * options.channels * 64 * 64 * 2 / median / 1e6}
        for name, median in ((name, statistics.median(times)) for name, times in seconds.items())
    }
    for name, rate in sorted(rates.items(), key=lambda item: -item[1]["rows_per_s"]):
        print(f"{name:26} {rate['rows_per_s']:9.0f} rows/s {rate['mb_per_s']:8.0f} MB/s")
    for title, found in ("ratio", ratios), ("ms per row", costs), ("extra MiB", memory):
        for name, value in found.items():
            print(f"{title:12} {name:30} {'not measured' if value is None else f'{value:.3f}'}")
    write_results(
        "write_cpu",
        {
            "ratios": ratios,
            "not_measured": missing,
            "rates": rates,
            "milliseconds_per_row": costs,
            "extra_memory_mib": memory,
            "seconds": summarise(seconds),
            "settings": vars(options),
            "contenders": versions(),
            "machine": describe_machine(),
        },
    )


if __name__ == "__main__":
    main()
