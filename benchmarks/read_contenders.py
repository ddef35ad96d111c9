"""Libraries that read a store's rows, ours among them: what benchmarks/read.py compares.

Each function opens its contender on the rows of a `Data` and gives a `Read`. `read_formats.py` has those that read
files of another format.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import zarr
from torch import Tensor
from zarr.core.buffer.cpu import NDBuffer

from sam_cache.batches import Preprocessing, object_columns
from sam_cache.data.synthetic import open_synthetic
from sam_cache.store import EmbeddingStore, LevelSpec, StoreSpec
from sam_cache.store.layout import decode_index, index_size, shard_path

LIBRARIES = ("tensorstore", "zarrs", "numcodecs", "h5py", "lmdb", "litdata", "mosaicml-streaming", "webdataset")


@dataclass(frozen=True)
class Data:
    """The rows (N, C, H, W) fp16 in memory, the store that holds them, and room for other formats."""

    values: np.ndarray
    store: EmbeddingStore
    folder: Path

    @property
    def raw(self) -> bool:
        """Whether the store keeps rows as they are, not compressed."""
        return self.store.spec.levels["neck"].codec == "raw"

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


def places_of(data: Data) -> list[tuple[Path, int]]:
    """File and offset of every row, from the shards' own indexes."""
    places = []
    for shard in data.store.shards():
        path = data.store.path / shard_path("neck", shard.index)
        size = index_size(data.store.spec.shard_rows)
        with open(path, "rb") as file:
            file.seek(-size, os.SEEK_END)
            places += [(path, entry[0]) for entry in decode_index(file.read()) if entry]
    return places


def preadv(data: Data) -> Read:
    """The least that reading can be: one system call per row, nothing checked."""
    if not data.raw:
        raise NotImplementedError("compressed rows have to be decoded")
    descriptors: dict[Path, int] = {}
    places = []
    for path, offset in places_of(data):
        descriptors.setdefault(path, os.open(path, os.O_RDONLY))
        places.append((descriptors[path], offset))

    def read(rows: list[int], out: Tensor) -> None:
        for row, target in zip(rows, out.numpy(), strict=True):
            descriptor, offset = places[row]
            os.preadv(descriptor, (target,), offset)

    return read


def verified(data: Data) -> Read:
    reader = data.store.reader()
    return lambda rows, out: reader.read(rows, {"neck": out})


def unverified(data: Data) -> Read:
    reader = data.store.reader(verify=False)
    return lambda rows, out: reader.read(rows, {"neck": out})


def zarr_python(data: Data) -> Read:
    """As its documentation reads: `array[row]`."""
    return copied(zarr.open_array(data.store.path / "neck", mode="r").__getitem__)


def into_by_zarr(array: zarr.Array) -> Read:
    """Rows put into the batch by zarr itself, which saves it a fresh array for each."""

    def read(rows: list[int], out: Tensor) -> None:
        for row, target in zip(rows, out.numpy(), strict=True):
            array.get_basic_selection(row, out=NDBuffer.from_numpy_array(target))

    return read


def zarr_python_into(data: Data) -> Read:
    return into_by_zarr(zarr.open_array(data.store.path / "neck", mode="r"))


def open_by_zarrs(data: Data) -> zarr.Array:
    import zarrs  # noqa: F401 - registers its pipeline

    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        return zarr.open_array(data.store.path / "neck", mode="r")


def zarrs(data: Data) -> Read:
    return copied(open_by_zarrs(data).__getitem__)


def zarrs_into(data: Data) -> Read:
    return into_by_zarr(open_by_zarrs(data))


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


def halved(read: Read, pool: ThreadPoolExecutor) -> Read:
    """Two threads, each with half of every batch."""

    def read_both(rows: list[int], out: Tensor) -> None:
        middle = len(rows) // 2
        parts = (rows[:middle], out[:middle]), (rows[middle:], out[middle:])
        for part in [pool.submit(read, *part) for part in parts]:
            part.result()

    return read_both


ON_THE_STORE = (
    memcpy, preadv, verified, unverified, zarr_python, zarr_python_into, zarrs, zarrs_into,
    tensorstore_into, tensorstore_batch, tensorstore_index,
)  # fmt: skip
IN_TWO_THREADS = (
    "memcpy", "preadv", "verified", "unverified", "zarr_python", "zarr_python_into", "zarrs", "zarrs_into",
    "tensorstore_into", "npy",
)  # fmt: skip


def gather(functions: Iterable[Callable], *arguments) -> tuple[dict[str, Callable], dict[str, str]]:
    """What each function makes, by its name, and the errors of those that could not."""
    made, refused = {}, {}
    for function in functions:
        try:
            made[function.__name__] = function(*arguments)
        except Exception as error:  # whatever a contender dies of is its result
            refused[function.__name__] = f"{type(error).__name__}: {error}"
    return made, refused


def versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
