"""How fast rows come from the disk, beside the disk's own rate, and what that takes of the processor.

    python benchmarks/read_cold.py [--rows 512] [--rounds 5] [--batch 32]      # about two minutes on two cores

The store and the other formats of `read.py`. Before each turn all files are written to disk and dropped from memory;
then every row is read once, in random order, into one reused batch tensor; of the ring's batches those in the middle
count, when its buffers are not fresh and it is ahead. `o_direct` reads past the page cache into aligned memory, one
row at a time (1) or four (4): what the disk gives to so few requests. `*_vs_o_direct` are shares of the faster of the
two, `cpu_ms` the processor's milliseconds per row, of all threads and of the kernel on their behalf.
"""

import argparse
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from measure import alternate, describe_machine, summarise, table, write_results
from page_cache import drop, files_below
from read_contenders import Data, Read, gather, halved, make_data, places_of, unverified, verified, zarr_python
from read_formats import npy

from sam_cache.store import Ring

TARGET = 0.9
SKIPPED = 4  # batches at both ends of the ring's stream
Turn = Callable[[], float]  # reads all batches, starts and stops the clock, and says for which share of them it ran
NAMES = {
    "o_direct_4": "O_DIRECT, four rows at a time",
    "o_direct_1": "O_DIRECT, row by row",
    "verified": "**ours**, verified",
    "unverified": "ours, not verified",
    "verified_2": "**ours**, verified, two threads",
    "ring": "**ours**, ring of batches, two threads",
    "npy": "`np.load` of a file per row",
    "npy_2": "`np.load`, two threads",
    "zarr_python": "zarr-python",
}


def o_direct(data: Data, batch: int, depth: int) -> Callable[[list[int]], None]:
    """Reads rows of a batch past the page cache, `depth` at a time."""
    size = data.values[0].nbytes
    room = np.frombuffer(mmap.mmap(-1, batch * size), np.uint8).reshape(batch, size)  # pages, so it is aligned
    descriptors: dict[Path, int] = {}
    places = []
    for path, offset in places_of(data):
        descriptors.setdefault(path, os.open(path, os.O_RDONLY | os.O_DIRECT))
        places.append((descriptors[path], offset))
    pool = ThreadPoolExecutor(depth)

    def read_row(row: int, target: np.ndarray) -> None:
        descriptor, offset = places[row]
        if os.preadv(descriptor, (target,), offset) != size:
            raise AssertionError("a short read")

    def read(rows: list[int]) -> None:
        list(pool.map(read_row, rows, room))

    read(list(range(batch)))
    if not np.array_equal(room[-1], data.values[batch - 1].view(np.uint8).reshape(-1)):
        raise AssertionError("o_direct did not read what was written")
    return read


class Clock:
    """Seconds, and those of the processor."""

    def start(self) -> None:
        self.started = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        self.seconds, self.processor = time.perf_counter() - self.started[0], time.process_time() - self.started[1]


def make_contenders(data: Data, batches: list[list[int]], clock: Clock) -> tuple[dict[str, Turn], dict[str, str]]:
    """By name: what reads all batches, and what failed."""
    out = torch.zeros(len(batches[0]), *data.values.shape[1:], dtype=torch.float16)
    reads, refused = gather((verified, unverified, npy, zarr_python), data)
    pool = ThreadPoolExecutor(2)
    reads |= {f"{name}_2": halved(reads[name], pool) for name in ("verified", "npy") if name in reads}

    def read_all(read: Read) -> float:
        clock.start()
        for rows in batches:
            read(rows, out[: len(rows)])
        clock.stop()
        return 1.0

    def ring() -> float:
        """Its share of the rows that count: all but those that pay for fresh buffers, and as many at the end."""
        stream = iter(Ring(data.store.reader(), batches))
        for _ in islice(stream, SKIPPED):
            pass
        clock.start()
        for _ in islice(stream, len(batches) - 2 * SKIPPED):
            pass
        clock.stop()
        stream.close()
        return 1 - 2 * SKIPPED / len(batches)

    def read_directly(read: Callable[[list[int]], None]) -> float:
        clock.start()
        for rows in batches:
            read(rows)
        clock.stop()
        return 1.0

    contenders: dict[str, Turn] = {name: partial(read_all, read) for name, read in reads.items()}
    if len(batches) > 2 * SKIPPED:
        contenders["ring"] = ring
    else:
        refused["ring"] = f"it takes more than {2 * SKIPPED} batches"
    for depth in (1, 4):
        try:
            contenders[f"o_direct_{depth}"] = partial(read_directly, o_direct(data, len(batches[0]), depth))
        except OSError as error:
            refused[f"o_direct_{depth}"] = str(error)
    return contenders, refused


def measure(data: Data, batches: list[list[int]], rounds: int) -> dict:
    clock = Clock()
    contenders, refused = make_contenders(data, batches, clock)
    files, rows = files_below(data.folder), sum(map(len, batches))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    processor: dict[str, list[float]] = {name: [] for name in contenders}

    def take(name: str) -> None:
        drop(files)
        share = contenders[name]()
        seconds[name].append(clock.seconds / share)
        processor[name].append(clock.processor / share)

    alternate({name: partial(take, name) for name in contenders}, rounds)
    seconds = {name: times[1:] for name, times in seconds.items()}
    direct = [times for name, times in seconds.items() if name.startswith("o_direct")]
    disk = [min(times) for times in zip(*direct, strict=True)]
    ratios = {
        f"{name}_vs_o_direct": statistics.median(a / b for a, b in zip(disk, seconds[name], strict=True))
        for name in seconds
        if disk and not name.startswith("o_direct")
    }
    rates = {
        name: {
            "rows_per_s": rows / statistics.median(times),
            "mb_per_s": rows * data.values[0].nbytes / statistics.median(times) / 1e6,
            "cpu_ms": 1000 * statistics.median(processor[name][1:]) / rows,
        }
        for name, times in sorted(seconds.items(), key=lambda item: statistics.median(item[1]))
    }
    return {"ratios": ratios, "rates": rates, "seconds": summarise(seconds), "not_measured": refused}


def render(result: dict) -> str:
    ratios = result["ratios"]
    rows = [
        [
            NAMES.get(name, name),
            f"{rate['rows_per_s']:.0f}",
            f"{rate['mb_per_s']:.0f}",
            f"{rate['cpu_ms']:.2f}",
            f"{ratios[f'{name}_vs_o_direct']:.2f}" if f"{name}_vs_o_direct" in ratios else "",
        ]
        for name, rate in result["rates"].items()
    ]
    lines = [table(["from the disk", "rows/s", "MB/s", "CPU ms per row", "of O_DIRECT"], rows)]
    if ratios:
        lines.append(
            f"Verified reading reaches {ratios['verified_vs_o_direct']:.0%} of the disk's O_DIRECT rate with one "
            f"thread, {ratios['verified_2_vs_o_direct']:.0%} with two; the target was {TARGET:.0%}."
        )
    if result["not_measured"]:
        lines.append("Not measured: " + "; ".join(f"{k} ({v})" for k, v in result["not_measured"].items()) + ".")
    return "\n\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--channels", type=int, default=256, help="of 64x64 values each")
    options = parser.parse_args()
    # Not in /tmp where that is memory.
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        data = make_data(Path(folder), options.rows, options.channels, "raw")
        order = np.random.default_rng(0).permutation(options.rows).tolist()
        batches = [order[first : first + options.batch] for first in range(0, options.rows, options.batch)]
        result = measure(data, batches, options.rounds)
    for name, rate in result["rates"].items():
        print(f"{name:14} {rate['rows_per_s']:8.0f} rows/s {rate['cpu_ms']:8.2f} CPU ms per row")
    write_results("read_cold_cpu", result | {"settings": vars(options), "machine": describe_machine()})


if __name__ == "__main__":
    main()
