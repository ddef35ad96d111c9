"""The writers that write.py compares; each takes shards in memory, a folder, and whether its files are synced."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from unittest.mock import patch

import numpy as np
import zarr

from sam_cache import durable
from sam_cache.store import EmbeddingStore, LevelSpec, StoreSpec
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
        # No option of the store: it is there to tell what the disk makes it wait for.
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
        "context": {"file_io_sync": False},
    }
    array = tensorstore.open(spec, open=True, read=True, write=True).result()

    def write() -> None:
        for place, values in zip(places, shards, strict=True):
            array[place].write(values, can_reference_source_data_indefinitely=True).result()
        if sync:
            durable.fsync_tree(path)

    return write, lambda row: array[row].read().result()


def npy(shards: list[np.ndarray], folder: Path, sync: bool) -> Written:
    def write() -> None:
        for number, values in enumerate(shards):
            for row, value in enumerate(values, start=number * len(values)):
                np.save(folder / f"{row}.npy", value)
        if sync:
            durable.fsync_tree(folder)

    return write, lambda row: np.load(folder / f"{row}.npy")


def bare(shards: list[np.ndarray], folder: Path, sync: bool) -> Written:
    """The bytes of a shard into one file, and nothing else."""

    def write() -> None:
        for number, values in enumerate(shards):
            with open(folder / str(number), "wb", buffering=0) as file:
                for value in values:
                    file.write(value)
        if sync:
            durable.fsync_tree(folder)

    def read(row: int) -> np.ndarray:
        number, place = divmod(row, len(shards[0]))
        return np.fromfile(folder / str(number), np.float16).reshape(shards[0].shape)[place]

    return write, read


OTHERS = (zarr_python, zarr_python_default, tensorstore, npy, bare)
CONTENDERS = {each.__name__: each for each in (ours, *OTHERS)}


def contender_versions() -> dict[str, str | None]:
    found = {}
    for name in ("zarr", "tensorstore", "google-crc32c"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
