import os

# TensorStore's RPC library writes to stderr unless told not to.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from sam_cache.store import EmbeddingStore, LevelSpec, Ragged, StoreSpec, Table
from sam_cache.types import ImageRecord

SHARD_ROWS = 4


def make_spec(
    dtype: str = "fp16", codec: str = "raw", two_levels: bool = False, early_dtype: str = "", **changes
) -> StoreSpec:
    """Level `early` is there with `two_levels`, or with an `early_dtype` of its own."""
    levels = {"neck": LevelSpec(4, 8, 8, dtype, codec)}
    if two_levels or early_dtype:
        levels["early"] = LevelSpec(6, 8, 8, early_dtype or dtype, codec)
    fields = {
        "encoder": "nano",
        "encoder_sha256": "ab" * 32,
        "levels": levels,
        "compute_dtype": "fp32",
        "preprocessing": {"fit": "longest", "input_size": 128, "mean": 0.5},
        "shard_rows": SHARD_ROWS,
    }
    return StoreSpec(**fields | changes)


def make_records(count: int) -> list[ImageRecord]:
    splits = ("train", "")
    return [ImageRecord(100 + i, f"folder/ö {i}.jpg", 30 + i, 40, splits[i % 2]) for i in range(count)]


def prepare(records: Sequence[ImageRecord]) -> Table:
    """Two objects per image."""
    rows = np.repeat(np.arange(len(records)), 2)
    return {
        "row": rows.astype(np.int64),
        "box_xywh_image": np.array([[r.id, 1, 2, 3] for r in records for _ in "ab"], np.float64).reshape(-1, 4),
        "iscrowd": rows % 2 == 1,
        "rle": Ragged.from_list([f"{r.path} {k}".encode() * k for r in records for k in range(2)]),
    }


def values(row: int, spec: StoreSpec) -> dict[str, np.ndarray]:
    """Row's levels in fp32."""
    draw = np.random.default_rng(row)
    return {name: draw.normal(size=level.shape).astype(np.float32) for name, level in spec.levels.items()}


def content(row: int) -> str:
    return hashlib.sha256(b"%d" % row).hexdigest()


def open_for(path: Path, spec: StoreSpec, count: int, **changes) -> EmbeddingStore:
    arguments = {
        "prepare": prepare,
        "base": b"the weights" * 100,
        "recorded": {"torch": "x"},
        "object_attributes": {"categories": {"1": "cat"}},
    }
    return EmbeddingStore.create_or_resume(path, spec, make_records(count), **arguments | changes)


def write(store: EmbeddingStore, failing: Sequence[int] = ()) -> None:
    """Write every uncommitted shard."""
    for shard in store.uncommitted():
        with store.writing(shard) as writer:
            for row in shard.rows:
                if row in failing:
                    writer.fail(row, "truncated\nJPEG")
                elif row not in writer.kept:
                    assert writer.append(row, values(row, store.spec), content(row))


def fill(store: EmbeddingStore, failing: Sequence[int] = ()) -> EmbeddingStore:
    """Write every uncommitted shard; returns the store as opened anew."""
    write(store, failing)
    return EmbeddingStore.open(store.path)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Fsync is slow, and no test here can cut the power; the order of calls is tested by name."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    """The makers above: with `--import-mode=importlib` tests cannot import them from here."""
    return SimpleNamespace(
        spec=make_spec,
        records=make_records,
        prepare=prepare,
        values=values,
        content=content,
        open=open_for,
        write=write,
        fill=fill,
    )
