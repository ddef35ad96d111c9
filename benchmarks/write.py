"""How fast whole shards are written, what that takes of memory, and what being safe costs.

    python benchmarks/write.py [--shards 2] [--shard-rows 64] [--rounds 7]      # about three minutes on two cores

Random fp16 rows, from memory to files: our writer row by row, zarr-python and TensorStore a shard at a time into
arrays of the very same metadata (sharded, a crc32c per row), one `.npy` per row, and one bare file per shard, which
is what the disk allows. No other library calls fsync of its own accord or by our leave: `vs_*`, how many times slower
a contender was than our writer, compare without it, for us too. `synced_vs_*` compare what lasts: our writer as it
is, and every contender followed by an fsync of its files. zarr-python compares every row with the fill value unless
told otherwise: `zarr_python_default` does, `zarr_python` does not.

In every turn a contender writes twice, into a new folder each time, and the second time counts: a virtual machine's
memory is slow when it is touched for the first time, and whose turn that would be is chance. What it wrote before the
first round was read back and compared. Making folders and metadata is not counted. Memory is the peak of a fresh
process over what it held before; the shard that zarr-python and TensorStore must be handed whole is not counted.

`pieces` are the processor milliseconds of all that is done for a row, each by itself, and what a sha256 of it would
add. `fsync_cost` is its share of the time with fsync, by leaving it out; `crc32c_cost` that of its piece of the time
without. All ratios are medians over rounds.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import google_crc32c
import numpy as np
from measure import Seconds, alternate, describe_machine, median_ratio, summarise, table, write_results
from write_contenders import CONTENDERS, OTHERS, contender_versions

from sam_cache.store import LevelSpec
from sam_cache.store.codecs import to_stored
from sam_cache.store.layout import CHECKSUM_BYTES, Extent


def check(contender: Callable, shards: list[np.ndarray], folder: Path, sync: bool) -> None:
    write, read = contender(shards, folder, sync)
    write()
    rows = np.concatenate(shards)
    for row in (0, len(rows) // 2, len(rows) - 1):
        if not np.array_equal(read(row), rows[row]):
            raise AssertionError(f"{contender.__name__} did not write what it was given")


def write_anew(contender: Callable, shards: list[np.ndarray], root: Path, sync: bool, notes: list[float]) -> None:
    """Note the seconds of the writing alone, the second time, on a disk that owes nothing to those before."""
    with tempfile.TemporaryDirectory(dir=root) as first, tempfile.TemporaryDirectory(dir=root) as then:
        contender(shards, Path(first), sync)[0]()
        write, _ = contender(shards, Path(then), sync)
        os.sync()
        shutil.rmtree(first)  # only now: a hypervisor takes free memory back within seconds
        Path(first).mkdir()
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


def extra_memory_of_its_own(*arguments: object) -> float:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(extra_memory, *arguments).result()


def status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def time_pieces(rows: list[np.ndarray], root: Path, rounds: int) -> dict[str, float]:
    """Processor milliseconds of a row for everything that is done to it, each by itself, median of rounds."""
    level = LevelSpec(*rows[0].shape, "fp16")
    exact = [row.astype(np.float32) for row in rows]
    end = Extent(0, rows[0].nbytes + CHECKSUM_BYTES, 0).end
    journal = json.dumps({"row": 0, "content": "00" * 32, "levels": {"neck": [0, 0, 0]}}).encode()

    def from_fp32() -> None:
        for row in exact:
            to_stored(row, "neck", level)

    def check_finite() -> None:
        for row in rows:
            to_stored(row, "neck", level)

    def checksum() -> None:
        for row in rows:
            google_crc32c.value(row.reshape(-1).view(np.uint8))

    def write(reserve: bool) -> None:
        path = root / "pieces"
        path.unlink(missing_ok=True)
        with open(path, "wb", buffering=0) as file:
            if reserve:
                os.posix_fallocate(file.fileno(), 0, end * len(rows))
            for number, row in enumerate(rows):
                os.pwrite(file.fileno(), memoryview(row).cast("B"), number * end)
                os.pwrite(file.fileno(), bytes(end - row.nbytes), number * end + row.nbytes)

    def digest() -> None:
        for row in rows:
            hashlib.sha256(row)

    def note() -> None:
        with open(root / "journal", "wb", buffering=0) as file:
            for _ in rows:
                file.write(journal)

    pieces = {
        "rounding fp32 to fp16 and the check for finite values": from_fp32,
        "the check alone, of fp16 values": check_finite,
        "crc32c": checksum,
        "writing without room taken in advance": partial(write, False),
        "writing": partial(write, True),
        "the journal's line": note,
        "not done: sha256": digest,
    }
    seconds: dict[str, list[float]] = {name: [] for name in pieces}
    for number in range(rounds + 1):
        for name, work in pieces.items():
            started = time.thread_time()
            work()
            if number:
                seconds[name].append(time.thread_time() - started)
    return {name: statistics.median(times) / len(rows) * 1e3 for name, times in seconds.items()}


def measure(shards: list[np.ndarray], rounds: int, root: Path, memory_of: Callable[..., float]) -> dict:
    """All figures but the settings and the machine. `memory_of` takes what `extra_memory` does."""
    runs, missing = {}, {}
    for name, contender in CONTENDERS.items():
        for suffix, sync in ("", False), ("_synced", True):
            folder = root / "check"
            folder.mkdir()
            try:
                check(contender, shards, folder, sync)
                runs[name + suffix] = contender, sync
            except ImportError as error:
                missing[name] = f"{type(error).__name__}: {error}"
            shutil.rmtree(folder)
    print(f"{len(runs)} contenders, {rounds} rounds of {sum(map(len, shards))} rows", flush=True)
    notes: dict[str, list[float]] = {name: [] for name in runs}
    alternate(
        {
            name: partial(write_anew, contender, shards, root, sync, notes[name])
            for name, (contender, sync) in runs.items()
        },
        rounds,
    )
    seconds = {name: times[1:] for name, times in notes.items()}
    memory = {name: memory_of(name, shards[0].shape, len(shards), root) for name in CONTENDERS if name in runs}
    pieces = time_pieces(list(shards[0]), root, rounds)
    rows, row_bytes = sum(map(len, shards)), shards[0][0].nbytes
    rates = {
        name: {"rows_per_s": rows / median, "mb_per_s": rows * row_bytes / median / 1e6}
        for name, median in ((name, statistics.median(times)) for name, times in seconds.items())
    }
    return {
        "ratios": compare(seconds, memory, pieces, rows),
        "not_measured": missing,
        "rates": rates,
        "pieces": pieces,
        "extra_memory_mib": memory,
        "seconds": summarise(seconds),
    }


def compare(seconds: Seconds, memory: dict, pieces: dict, rows: int) -> dict[str, float | None]:
    ratios: dict[str, float | None] = {}
    for kind, suffix in ("", ""), ("synced_", "_synced"):
        for other in (each.__name__ for each in OTHERS):
            known = f"{other}{suffix}" in seconds
            ratio = median_ratio(seconds, f"{other}{suffix}", f"ours{suffix}") if known else None
            ratios[f"{kind}vs_{other}"] = ratio
    whole = statistics.median(seconds["ours"]) / rows * 1e3
    return ratios | {
        "extra_memory_mib": memory["ours"],
        "fsync_cost": 1 - 1 / median_ratio(seconds, "ours_synced", "ours"),
        "crc32c_cost": pieces["crc32c"] / whole,
    }


NAMES = {
    "ours": "**samcache**",
    "tensorstore": "TensorStore",
    "zarr_python": "zarr-python, told not to look for empty rows",
    "zarr_python_default": "zarr-python",
    "npy": "a `.npy` per row",
    "bare": "a bare file per shard",
}


def render(result: dict) -> str:
    rates, ratios, memory = result["rates"], result["ratios"], result["extra_memory_mib"]

    def rate(name: str) -> str | None:
        return f"{rates[name]['rows_per_s']:,.0f}" if name in rates else None

    def times(name: str) -> str | None:
        if name == "ours":
            return "1"
        return None if ratios[name := f"vs_{name}"] is None else f"{ratios[name]:.2f}x"

    def synced(name: str) -> str | None:
        found = None if name == "ours" else ratios[f"synced_vs_{name}"]
        return times(name) if found is None else f"{found:.2f}x"

    order = sorted(NAMES, key=lambda name: -rates.get(name, {"rows_per_s": 0})["rows_per_s"])
    head = ["writer", "rows/s", "slower than ours by", "rows/s, synced", "slower by", "extra memory, MiB"]
    rows = [
        [NAMES[name], rate(name), times(name), rate(f"{name}_synced"), synced(name),
         f"{memory[name]:.0f}" if name in memory else ""]
        for name in order
    ]  # fmt: skip
    pieces = table(["of a row", "processor ms"], [[name, f"{ms:.2f}"] for name, ms in result["pieces"].items()])
    targets = {"vs_tensorstore": 4, "vs_zarr_python_default": 5, "vs_zarr_python": 5, "vs_npy": 1}
    found = ", ".join(
        f"{ratios[name]:.2f}x {NAMES[name.removeprefix('vs_')]} ({'met' if ratios[name] >= target else 'target'}"
        f"{'' if ratios[name] >= target else f' {target}x'})"
        for name, target in targets.items()
        if ratios[name] is not None
    )
    lasting = ", ".join(
        f"{ratios[f'synced_{name}']:.2f}x {NAMES[name.removeprefix('vs_')]}"
        for name in targets
        if ratios[f"synced_{name}"] is not None
    )
    return "\n\n".join(
        [
            table(head, rows),
            f"Against its targets, without fsync on either side: {found}. With fsync on both: {lasting}. Ratios are "
            f"medians over rounds. fsync takes {ratios['fsync_cost']:.0%} of the time with it, the crc32c "
            f"{ratios['crc32c_cost']:.0%} of the time without.",
            pieces,
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=2, help="in each round")
    parser.add_argument("--shard-rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--channels", type=int, default=256, help="of 64x64 values each")
    options = parser.parse_args()
    shape = options.shard_rows, options.channels, 64, 64
    shards = [
        np.random.default_rng(number).standard_normal(shape, np.float32).astype(np.float16)
        for number in range(options.shards)
    ]
    with tempfile.TemporaryDirectory() as folder:
        result = measure(shards, options.rounds, Path(folder), extra_memory_of_its_own)
    result |= {"settings": vars(options), "contenders": contender_versions(), "machine": describe_machine()}
    print(render(result))
    write_results("write_cpu", result)


if __name__ == "__main__":
    main()
