"""How fast rows come out of a store, beside what one would use instead.

    python benchmarks/read.py [--codec raw] [--rows 256] [--rounds 9] [--other-python PATH ...]     # about four minutes

Random fp16 rows are written once by every library in its own format; the first batch of each contender is
compared with them before anything is timed. Then the contenders take turns, page cache warm and held there:

- rows, in random order, into one reused batch tensor, asked for by one thread (what a library does in threads of its
  own is its affair) and, where `_2` stands, by two that share a batch. `_into` hands the library the place in the batch
  to put a row, `_batch` and `_index` are its ways to ask for many at once; where none stands it is `array[row]`;
- of raw rows also batches delivered to a loop that does nothing else: our ring, with and without masks and prompts, and
  two-worker DataLoaders (see `read_streams.py`).

`vs_*` are how many times slower a contender was than our reader without verification, `verified_vs_*` with it,
`*_vs_memcpy` the share of a memory copy's rate, `*_vs_preadv` that of a bare loop of system calls; all in the same
round, medians. Those that end in `_2` compare two threads with two. TensorStore counts by its fastest way, of
compressed rows too. zarr-python and TensorStore verify the crc32c, zarrs does not for single rows, the others have
none. `zarr_python_3_4` is what `--other-python`, an interpreter with a newer zarr, answers, by the fastest of its ways.
The dependency group `contenders` brings those that the tests do not need; what is not installed or does not run is
listed under `not_measured`, with its error.
"""

import argparse
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from measure import Seconds, alternate, describe_machine, median_ratio, summarise, table, write_results
from page_cache import files_below, held
from read_contenders import IN_TWO_THREADS, ON_THE_STORE, Data, Read, gather, halved, make_data, versions
from read_elsewhere import OtherPython
from read_formats import OTHER_FORMATS
from read_streams import RATIOS, SKIPPED, time_streams

TENSORSTORE = ("tensorstore_into", "tensorstore_batch", "tensorstore_index")
LABELS = {
    "memcpy": "a memory copy",
    "preadv": "a bare `preadv` loop",
    "verified": "**samcache, verified**",
    "unverified": "**samcache, not verified**",
    "zarr_python": "zarr-python",
    "zarr_python_into": "zarr-python, `out=`",
    "zarrs": "zarrs",
    "zarrs_into": "zarrs, `out=`",
    "tensorstore_into": "TensorStore, into the batch",
    "tensorstore_batch": "TensorStore, one `Batch`",
    "tensorstore_index": "TensorStore, one index",
    "npy": "`np.load` of a file per row",
    "torch_save": "`torch.load` of a file per row",
    "h5py": "h5py",
    "lmdb": "LMDB",
    "litdata": "litdata",
    "mosaicml_streaming": "mosaicml-streaming",
    "webdataset": "webdataset (in its own order)",
    "ring": "**samcache's ring**",
    "dataloader_npy": "`DataLoader`, 2 workers, `.npy`",
    "dataloader_zarr": "`DataLoader`, 2 workers, zarr-python",
}
BESIDE = {
    "_with_masks": ", with prompts and masks",
    "_with_known_masks": ", with prompts and masks seen before",
    "_with_our_masks": ", with prompts and masks by our code",
}
LABELS |= {name + end: LABELS[name] + text for name in ("ring", "dataloader_npy", "dataloader_zarr")
           for end, text in BESIDE.items()}  # fmt: skip
TARGETS = {
    "raw": {
        "verified_vs_memcpy": 0.5, "unverified_vs_memcpy": 0.7, "unverified_vs_preadv": 0.9,
        "verified_vs_zarr_python": 5, "vs_zarr_python": 8, "vs_zarrs": 5, "vs_tensorstore": 1.5, "vs_npy": 2.2,
        "delivered_vs_dataloader_npy": 5, "delivered_vs_dataloader_zarr": 8,
        "delivered_with_masks_vs_dataloader_npy": 5, "delivered_with_masks_vs_dataloader_zarr": 8,
    },
}  # fmt: skip
TARGETS_COMPRESSED = {"verified_vs_zarr_python_2": 3.5, "verified_vs_tensorstore_2": 1.4}


def time_rows(
    data: Data, batches: list[list[int]], rounds: int, others: list[OtherPython]
) -> tuple[Seconds, dict[str, str], bool]:
    """Seconds for all batches, what did not run, and whether the files could be held in memory."""
    reads, refused = gather(ON_THE_STORE + OTHER_FORMATS * data.raw, data)
    out = torch.zeros(len(batches[0]), *data.values.shape[1:], dtype=torch.float16)
    for name, read in list(reads.items()):
        rows = list(range(len(batches[0]))) if name == "webdataset" else batches[0]
        try:
            read(rows, out.zero_())
        except Exception as error:
            refused[name] = f"{type(error).__name__}: {error}"
            del reads[name]
            continue
        if not np.array_equal(out.numpy(), data.values[rows]):
            raise AssertionError(f"{name} did not read what was written")

    def read_all(read: Read) -> None:
        for rows in batches:
            read(rows, out[: len(rows)])

    with ThreadPoolExecutor(2) as pool, held(files_below(data.folder)) as allowed:
        reads |= {f"{name}_2": halved(reads[name], pool) for name in IN_TWO_THREADS if name in reads}
        contenders = {name: partial(read_all, read) for name, read in reads.items()}
        contenders |= {other.name: other.read_all for other in others}
        return alternate(contenders, rounds), refused, allowed


def compare(seconds: Seconds, missing: dict[str, str]) -> tuple[dict[str, float | None], dict[str, str]]:
    """The ratios by name, and which of TensorStore's ways was the fastest, for one thread and two."""
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ways = {"": TENSORSTORE, "_2": (*TENSORSTORE, "tensorstore_into_2")}
    fastest = {threads: min(names, key=lambda name: medians.get(name, np.inf)) for threads, names in ways.items()}
    pairs = {}
    for threads in ("", "_2"):
        rivals = {
            name: f"{name}{threads}" for name in ("zarr_python", "zarr_python_into", "zarrs", "zarrs_into", "npy")
        }
        rivals |= {"tensorstore": fastest[threads]}
        rivals |= {} if threads else {name: name for name in seconds if name.startswith("zarr_python_3")}
        for ours, prefix in (("verified", "verified_"), ("unverified", "")):
            pairs[f"{ours}_vs_memcpy{threads}"] = (f"memcpy{threads}", f"{ours}{threads}")
            pairs[f"{ours}_vs_preadv{threads}"] = (f"preadv{threads}", f"{ours}{threads}")
            pairs |= {f"{prefix}vs_{name}{threads}": (rival, f"{ours}{threads}") for name, rival in rivals.items()}
    pairs |= RATIOS
    ratios: dict[str, float | None] = {}
    for name, (slower, faster) in pairs.items():
        lacking = [each for each in (faster, slower) if each not in seconds]
        ratios[name] = None if lacking else median_ratio(seconds, slower, faster)
        if lacking:
            missing.setdefault(name, missing.get(lacking[0], "not part of this run"))
    return ratios, fastest


def measure(data: Data, batches: list[list[int]], rounds: int, other_pythons: list[str]) -> dict:
    others, refused = [], {}
    for python in other_pythons:
        try:
            others.append(OtherPython(python, data.store.path / "neck", data.values, batches))
        except Exception as error:  # whatever a contender dies of is its result
            refused[python] = f"{type(error).__name__}: {error}"
    seconds, unread, allowed = time_rows(data, batches, rounds, others)
    for other in others:
        other.close()
    streamed, unstreamed = time_streams(data, batches, rounds) if data.raw else ({}, {})
    seconds |= streamed
    missing = refused | unread | unstreamed
    ratios, fastest = compare(seconds, missing)
    rows, size = sum(map(len, batches)), data.values[0].nbytes
    medians = sorted((statistics.median(times), name) for name, times in seconds.items())
    return {
        "ratios": ratios,
        "not_measured": missing,
        "rates": {name: {"rows_per_s": rows / s, "mb_per_s": rows * size / s / 1e6} for s, name in medians},
        "seconds": summarise(seconds),
        "held_in_memory": allowed,
        "tensorstore": fastest,
        "other_pythons": {other.name: other.answer for other in others},
    }


def render(result: dict) -> str:
    """The rates, the ratios beside their targets, and what was not measured."""
    rates, ratios = result["rates"], result["ratios"]
    streams = [name for name in rates if name.startswith(("ring", "dataloader"))]
    by_library = [name for name in rates if name not in streams and not name.endswith("_2")]

    def rate(name: str) -> str:
        return f"{rates[name]['rows_per_s']:,.0f}" if name in rates else ""

    def label(name: str) -> str:
        version = result["other_pythons"].get(name, {}).get("zarr")
        return f"zarr-python {version}" if version else LABELS.get(name, name)

    rows = [
        [label(name), rate(name), f"{rates[name]['mb_per_s'] / 1000:.1f}", rate(f"{name}_2")] for name in by_library
    ]
    codec = result["settings"]["codec"]
    targets = TARGETS.get(codec, TARGETS_COMPRESSED)
    asked = [
        [f"`{name}`", f"{target:g}", None if ratios[name] is None else f"{ratios[name]:.2f}"]
        for name, target in targets.items()
    ]
    both = [name for name in ratios if f"{name}_2" in ratios and ratios[name] is not None]
    threads = [
        [f"`{name}`", f"{ratios[name]:.2f}", "" if ratios[f"{name}_2"] is None else f"{ratios[f'{name}_2']:.2f}"]
        for name in both
    ]
    parts = [
        table(["rows into a batch", "rows/s, one thread", "GB/s", "rows/s, two threads"], rows),
        table(["ratio", "target", "measured"], asked),
        "All ratios of rows:\n\n" + table(["ratio", "one thread", "two threads"], threads),
    ]
    if codec == "raw":
        parts.insert(1, table(["batches delivered", "rows/s"], [[label(name), rate(name)] for name in streams]))
    if not result["held_in_memory"]:
        parts.append("The system did not allow the files to be held in memory: some were read from the disk again.")
    if missing := {name: why for name, why in result["not_measured"].items() if name not in ratios}:
        parts.append("Not measured: " + "; ".join(f"{name} ({why})" for name, why in missing.items()) + ".")
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--channels", type=int, default=256, help="of 64x64 values each")
    parser.add_argument("--codec", choices=["raw", "zstd", "blosc"], default="raw")
    parser.add_argument("--other-python", action="append", default=[], help="an interpreter with another zarr-python")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder), options.rows, options.channels, options.codec)
        order = np.random.default_rng(0).permutation(options.rows).tolist()
        batches = [order[first : first + options.batch] for first in range(0, options.rows, options.batch)]
        result = measure(data, batches, options.rounds, options.other_python)
    for name, rate in result["rates"].items():
        print(f"{name:26} {rate['rows_per_s']:10.0f} rows/s {rate['mb_per_s']:10.0f} MB/s")
    for name, ratio in result["ratios"].items():
        print(f"{name:42} {'not measured' if ratio is None else f'{ratio:.2f}'}")
    settings = vars(options) | {"skipped_batches": SKIPPED}
    name = "read_cpu" if options.codec == "raw" else f"read_{options.codec}_cpu"
    write_results(name, result | {"settings": settings, "contenders": versions(), "machine": describe_machine()})


if __name__ == "__main__":
    main()
