"""How fast rows come out of a store, beside what one would use instead.

    python benchmarks/read.py [--rows 512] [--rounds 5] [--batch 32] [--codec raw]

Random fp16 rows are written once by every library in its own format; the first batch of each contender is
compared with them before anything is timed. Then the contenders take turns, page cache warm:

- rows, in random order, into one reused batch tensor, asked for by one thread (what a library does in threads of its
  own is its affair) and, where `_2` stands, by two that share a batch;
- batches delivered to a loop that does nothing else: our ring, with and without masks and prompts, and two-worker
  DataLoaders. The first batches, which pay for fresh buffers and waiting queues, are not counted.

`vs_*` are how many times slower a contender was than our reader without verification, `verified_vs_*` with it,
`*_vs_memcpy` the share of a memory copy's rate. zarr-python and TensorStore verify the crc32c, zarrs does not
for single rows, the others have none. The dependency group `contenders` brings those that the tests do not need; what
is not installed or does not run is listed under `not_measured`, with its error.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from inspect import signature
from itertools import chain, cycle, islice
from pathlib import Path

import numpy as np
import torch
import zarr
from measure import alternate, describe_machine, median_ratio, summarise, write_results
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sam_cache.batches import Annotator, CachedBatches, Order, Preprocessing, Sampling, Visit, object_columns
from sam_cache.batches.annotations import Annotation
from sam_cache.data import parse_prompts
from sam_cache.data.synthetic import open_synthetic
from sam_cache.store import EmbeddingStore, LevelSpec, Ring, StoreSpec
from sam_cache.store.layout import decode_index, index_size, shard_path

LIBRARIES = ("tensorstore", "zarrs", "numcodecs", "h5py", "lmdb", "litdata", "mosaicml-streaming", "webdataset")
SKIPPED = 4  # batches not counted at the start of a stream: no contender runs further ahead
TENSORSTORE = ("tensorstore_into", "tensorstore_batch", "tensorstore_index")


@dataclass(frozen=True)
class Data:
    """The rows (N, C, H, W) fp16 in memory, the store that holds them, and room for other formats."""

    values: np.ndarray
    store: EmbeddingStore
    folder: Path

    def room(self, name: str) -> Path:
        path = self.folder / name
        path.mkdir()
        return path


Read = Callable[[list[int], Tensor], object]  # rows, and the tensor (rows, C, H, W) to fill with them


def make_data(folder: Path, rows: int, channels: int, codec: str) -> Data:
    """Normal deviates for embeddings, generated scenes for masks."""
    scenes = open_synthetic(rows)
    level = LevelSpec(channels, 64, 64, "fp16", codec)
    spec = StoreSpec("none", "00" * 32, {"neck": level}, "fp32", vars(Preprocessing(1024)))
    store = EmbeddingStore.create_or_resume(
        folder / "rows.zarr",
        spec,
        scenes.images,
        prepare=lambda _: object_columns(scenes, ((row, row) for row in range(rows))),
        base=b"none",
        recorded={},
        object_attributes={},
    )
    values = np.empty((rows, *level.shape), np.float16)
    for row, value in enumerate(values):
        value[:] = np.random.default_rng(row).standard_normal(level.shape, np.float32)
    for shard in store.uncommitted():
        with store.writing(shard) as writer:
            for row in shard.rows:
                writer.append(row, {"neck": values[row]}, content="00" * 32)
    return Data(values, store, folder)


def copied(get: Callable[[int], np.ndarray]) -> Read:
    """For what hands out one array per row: each is copied to its place."""

    def read(rows: list[int], out: Tensor) -> None:
        for row, target in zip(rows, out.numpy(), strict=True):
            np.copyto(target, get(row))

    return read


def memcpy(data: Data) -> Read:
    return copied(data.values.__getitem__)


def preadv(data: Data) -> Read:
    """The least that reading can be: one system call per row, nothing checked."""
    if data.store.spec.levels["neck"].codec != "raw":
        raise NotImplementedError("compressed rows have to be decoded")
    places = []
    for shard in data.store.shards():
        descriptor = os.open(data.store.path / shard_path("neck", shard.index), os.O_RDONLY)
        size = index_size(data.store.spec.shard_rows)
        entries = decode_index(os.pread(descriptor, size, os.fstat(descriptor).st_size - size))
        places += [(descriptor, entry[0]) for entry in entries if entry]

    def read(rows: list[int], out: Tensor) -> None:
        for row, target in zip(rows, out.numpy(), strict=True):
            descriptor, offset = places[row]
            os.preadv(descriptor, (target,), offset)

    return read


def verified(data: Data) -> Read:
    reader = data.store.reader()
    return lambda rows, out: reader.read(rows, {"neck": out})


def unverified(data: Data) -> Read:
    if "verify" not in signature(data.store.reader).parameters:
        raise NotImplementedError("not offered: our reader always verifies")
    reader = data.store.reader(verify=False)
    return lambda rows, out: reader.read(rows, {"neck": out})


def zarr_python(data: Data) -> Read:
    return copied(zarr.open_array(data.store.path / "neck", mode="r").__getitem__)


def zarrs(data: Data) -> Read:
    import zarrs  # noqa: F401 - registers its pipeline

    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        return copied(zarr.open_array(data.store.path / "neck", mode="r").__getitem__)


def open_tensorstore(data: Data):
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # else its RPC library writes to stderr
    import tensorstore

    where = {"driver": "file", "path": str(data.store.path / "neck")}
    return tensorstore, tensorstore.open({"driver": "zarr3", "kvstore": where}, open=True, read=True).result()


def tensorstore_into(data: Data) -> Read:
    """Rows copied by TensorStore itself, several at once, into the memory of the batch."""
    tensorstore, rows_of = open_tensorstore(data)

    def read(rows: list[int], out: Tensor) -> None:
        target = tensorstore.array(out.numpy(), copy=False)
        for writing in [target[place].write(rows_of[row]) for place, row in enumerate(rows)]:
            writing.result()

    return read


def tensorstore_batch(data: Data) -> Read:
    """Rows asked for in one transaction of requests, and copied when they come."""
    tensorstore, rows_of = open_tensorstore(data)

    def read(rows: list[int], out: Tensor) -> None:
        with tensorstore.Batch() as batch:
            reading = [rows_of[row].read(batch=batch) for row in rows]
        for target, future in zip(out.numpy(), reading, strict=True):
            np.copyto(target, future.result())

    return read


def tensorstore_index(data: Data) -> Read:
    """A list of rows as one index."""
    tensorstore, rows_of = open_tensorstore(data)

    def read(rows: list[int], out: Tensor) -> None:
        tensorstore.array(out.numpy(), copy=False).write(rows_of[rows]).result()

    return read


def npy_files(data: Data) -> list[Path]:
    folder = data.folder / "npy"
    files = [folder / f"{row}.npy" for row in range(len(data.values))]
    if not folder.exists():
        folder.mkdir()
        for file, value in zip(files, data.values, strict=True):
            np.save(file, value)
    return files


def npy(data: Data) -> Read:
    files = npy_files(data)
    return copied(lambda row: np.load(files[row]))


def torch_save(data: Data) -> Read:
    folder = data.room("torch")
    for row, value in enumerate(data.values):
        torch.save(torch.from_numpy(value), folder / f"{row}.pt")
    return copied(lambda row: torch.load(folder / f"{row}.pt").numpy())


def h5py(data: Data) -> Read:
    import h5py

    path = data.room("h5py") / "rows.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("neck", data=data.values, chunks=(1, *data.values.shape[1:]))
    rows_of = h5py.File(path, "r")["neck"]

    def read(rows: list[int], out: Tensor) -> None:
        for row, target in zip(rows, out.numpy(), strict=True):
            rows_of.read_direct(target, np.s_[row])

    return read


def lmdb(data: Data) -> Read:
    import lmdb

    room = lmdb.open(str(data.room("lmdb")), map_size=2 * data.values.nbytes + 2**24)
    for row, value in enumerate(data.values):
        with room.begin(write=True) as change:
            change.put(b"%d" % row, value.tobytes())
    look, shape = room.begin(buffers=True), data.values.shape[1:]
    return copied(lambda row: np.frombuffer(look.get(b"%d" % row), np.float16).reshape(shape))


def litdata(data: Data) -> Read:
    from litdata import StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    folder = str(data.room("litdata"))
    writer = BinaryWriter(folder, chunk_bytes="64MB")
    for row, value in enumerate(data.values):
        writer[row] = torch.from_numpy(value)
    writer.done()
    writer.merge()
    rows_of = StreamingDataset(folder)
    return copied(lambda row: rows_of[row].numpy())


def mosaicml_streaming(data: Data) -> Read:
    from streaming import LocalDataset, MDSWriter

    folder = str(data.room("mosaicml_streaming"))
    shape = ",".join(map(str, data.values.shape[1:]))
    with MDSWriter(out=folder, columns={"neck": f"ndarray:float16:{shape}"}) as writer:
        for value in data.values:
            writer.write({"neck": value})
    rows_of = LocalDataset(folder)
    return copied(lambda row: rows_of[row]["neck"])


def webdataset(data: Data) -> Read:
    """In the order of the file, whatever rows are asked for: it has no other."""
    import webdataset

    path = str(data.room("webdataset") / "rows.tar")
    with webdataset.TarWriter(path) as writer:
        for row, value in enumerate(data.values):
            writer.write({"__key__": f"{row:08d}", "npy": value})
    stream: Iterator = iter(())

    def get(row: int) -> np.ndarray:
        nonlocal stream
        if (found := next(stream, None)) is None:
            stream = iter(webdataset.WebDataset(path, shardshuffle=False).decode())
            found = next(stream)
        return found["npy"]

    return copied(get)


def halved(read: Read, pool: ThreadPoolExecutor) -> Read:
    """Two threads, each with half of every batch."""

    def read_both(rows: list[int], out: Tensor) -> None:
        middle = len(rows) // 2
        parts = (rows[:middle], out[:middle]), (rows[middle:], out[middle:])
        for part in [pool.submit(read, *part) for part in parts]:
            part.result()

    return read_both


ON_THE_STORE = (
    memcpy, preadv, verified, unverified, zarr_python, zarrs, tensorstore_into, tensorstore_batch, tensorstore_index
)  # fmt: skip
OTHER_FORMATS = (npy, torch_save, h5py, lmdb, litdata, mosaicml_streaming, webdataset)
IN_TWO_THREADS = ("memcpy", "preadv", "verified", "unverified", "zarr_python", "zarrs", "tensorstore_into", "npy")


class NpyRows(Dataset):
    """Rows as torch's tutorials would read them."""

    def __init__(self, files: list[Path]):
        self.files = files

    def __getitem__(self, row: int) -> Tensor:
        return torch.from_numpy(np.load(self.files[row]))


class NpyRowsWithMasks(NpyRows):
    """The same with what our ring delivers beside them, made by the same code: in processes instead of threads."""

    def __init__(self, files: list[Path], annotator: Annotator):
        super().__init__(files)
        self.annotator = annotator

    def __getitem__(self, row: int) -> tuple[Tensor, Annotation]:
        return super().__getitem__(row), self.annotator.annotate([Visit(row)])


def collate(items: list[tuple[Tensor, Annotation]]) -> tuple[Tensor, Annotation]:
    rows, annotations = zip(*items, strict=True)
    return torch.stack(rows), Annotation.join(annotations)


class ZarrRows(Dataset):
    def __init__(self, folder: Path):
        self.array = zarr.open_array(folder, mode="r")

    def __getitem__(self, row: int) -> Tensor:
        return torch.from_numpy(self.array[row])


Stream = Callable[[], Iterable[Tensor]]  # batches in the order given, then perhaps more


def ring(data: Data, batches: list[list[int]]) -> Stream:
    def stream() -> Iterator[Tensor]:
        for levels in Ring(data.store.reader(), batches):
            yield levels["neck"]

    return stream


def make_annotator(data: Data) -> Annotator:
    sampling = Sampling(parse_prompts("box"), seed=0, training=True)
    return Annotator(data.store.images, data.store.objects(), Preprocessing(1024), 256, sampling)


class Given(Order):
    """The rows as they are listed, epoch after epoch, so that every contender delivers the same batches."""

    def epoch(self, epoch: int) -> list[Visit]:
        return [Visit(row, epoch) for row in self.rows.tolist()]


def ring_with_masks(data: Data, batches: list[list[int]]) -> Stream:
    """What `samcache train-top` is given: prompts, and 256x256 masks of all objects."""
    annotator = make_annotator(data)
    order = Given(np.array(list(dict.fromkeys(chain(*batches)))), seed=0)

    def stream() -> Iterator[Tensor]:
        for batch in CachedBatches(data.store, annotator, order, batch_size=len(batches[0])):
            yield batch.levels["neck"]

    return stream


def loader(dataset: Dataset, batches: list[list[int]], **options) -> Stream:
    # Spawned, not forked: this process has threads of several libraries by now. They stay for all rounds.
    options |= {"num_workers": 2, "persistent_workers": True, "multiprocessing_context": "spawn"}
    together = DataLoader(dataset, batch_sampler=batches, **options)
    return lambda: together


def dataloader_npy(data: Data, batches: list[list[int]]) -> Stream:
    return loader(NpyRows(npy_files(data)), batches)


def dataloader_zarr(data: Data, batches: list[list[int]]) -> Stream:
    return loader(ZarrRows(data.store.path / "neck"), batches)


def dataloader_npy_with_masks(data: Data, batches: list[list[int]]) -> Stream:
    together = loader(NpyRowsWithMasks(npy_files(data), make_annotator(data)), batches, collate_fn=collate)

    def stream() -> Iterator[Tensor]:
        for rows, _ in together():
            yield rows

    return stream


STREAMS = (ring, ring_with_masks, dataloader_npy, dataloader_npy_with_masks, dataloader_zarr)


def gather(functions: Iterable[Callable], *arguments) -> tuple[dict[str, Callable], dict[str, str]]:
    """What each function makes, by its name, and the errors of those that could not."""
    made, refused = {}, {}
    for function in functions:
        try:
            made[function.__name__] = function(*arguments)
        except Exception as error:  # whatever a contender dies of is its result
            refused[function.__name__] = f"{type(error).__name__}: {error}"
    return made, refused


def time_rows(data: Data, batches: list[list[int]], rounds: int) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds for all batches, per contender and round."""
    raw = data.store.spec.levels["neck"].codec == "raw"
    reads, refused = gather(ON_THE_STORE + OTHER_FORMATS * raw, data)
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

    with ThreadPoolExecutor(2) as pool:
        reads |= {f"{name}_2": halved(reads[name], pool) for name in IN_TWO_THREADS if name in reads}
        return alternate({name: partial(read_all, read) for name, read in reads.items()}, rounds), refused


def time_streams(data: Data, batches: list[list[int]], rounds: int) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds for as many batches as there are, after the first ones, per contender and round."""
    count = len(batches)
    streams, refused = gather(STREAMS, data, list(islice(cycle(batches), SKIPPED + count)))
    notes: dict[str, list[float]] = {name: [] for name in streams}

    def take_all(name: str) -> None:
        stream = iter(streams[name]())
        first = next(stream)
        if not notes[name] and not np.array_equal(first, data.values[batches[0]]):
            raise AssertionError(f"{name} did not deliver what was written")
        for _ in islice(stream, SKIPPED - 1):
            pass
        started = time.perf_counter()
        for _ in islice(stream, count):
            pass
        notes[name].append(time.perf_counter() - started)
        with suppress(AttributeError):
            stream.close()

    alternate({name: partial(take_all, name) for name in streams}, rounds)
    return {name: times[1:] for name, times in notes.items()}, refused


def versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--channels", type=int, default=256, help="of 64x64 values each")
    parser.add_argument("--codec", choices=["raw", "zstd", "blosc"], default="raw")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder), options.rows, options.channels, options.codec)
        order = np.random.default_rng(0).permutation(options.rows).tolist()
        batches = [order[first : first + options.batch] for first in range(0, options.rows, options.batch)]
        seconds, refused = time_rows(data, batches, options.rounds)
        streamed, unstreamed = time_streams(data, batches, options.rounds)
    report(options, seconds | streamed, refused | unstreamed)


def report(options: argparse.Namespace, seconds: dict[str, list[float]], missing: dict[str, str]) -> None:
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    tensorstore = min(TENSORSTORE, key=lambda name: medians.get(name, np.inf))
    contenders = {"zarr_python": "zarr_python", "zarrs": "zarrs", "tensorstore": tensorstore, "npy": "npy"}
    pairs = {f"{ours}_vs_memcpy": ("memcpy", ours) for ours in ("verified", "unverified")}
    pairs |= {"unverified_vs_preadv": ("preadv", "unverified")}
    pairs |= {f"vs_{name}": (slower, "unverified") for name, slower in contenders.items()}
    pairs |= {f"verified_vs_{name}": (slower, "verified") for name, slower in contenders.items()}
    pairs |= {f"delivered_vs_dataloader_{name}": (f"dataloader_{name}", "ring") for name in ("npy", "zarr")}
    pairs |= {"delivered_with_masks_vs_dataloader_npy": ("dataloader_npy_with_masks", "ring_with_masks")}
    pairs |= {"masks_vs_ring": ("ring_with_masks", "ring")}
    ratios: dict[str, float | None] = {}
    for name, (slower, faster) in pairs.items():
        lacking = [each for each in (faster, slower) if each not in seconds]
        ratios[name] = None if lacking else median_ratio(seconds, slower, faster)
        missing |= {name: missing.get(lacking[0], "not part of this run")} if lacking else {}
    size = options.channels * 64 * 64 * 2
    rates = {
        name: {"rows_per_s": options.rows / median, "mb_per_s": options.rows * size / median / 1e6}
        for name, median in sorted(medians.items(), key=lambda item: item[1])
    }
    for name, rate in rates.items():
        print(f"{name:24} {rate['rows_per_s']:10.0f} rows/s {rate['mb_per_s']:10.0f} MB/s")
    for name, ratio in ratios.items():
        print(f"{name:40} {'not measured' if ratio is None else f'{ratio:.2f}'}")
    write_results(
        "read_cpu" if options.codec == "raw" else f"read_{options.codec}_cpu",
        {
            "ratios": ratios,
            "not_measured": missing,
            "rates": rates,
            "seconds": summarise(seconds),
            "settings": vars(options) | {"tensorstore": tensorstore, "skipped_batches": SKIPPED},
            "contenders": versions(),
            "machine": describe_machine(),
        },
    )


if __name__ == "__main__":
    main()
