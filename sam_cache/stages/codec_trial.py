"""What a type of values and a codec do to rows that another store holds exactly: bytes, speed, error."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from sam_cache.quantisation import dequantise
from sam_cache.store import OK, EmbeddingStore, LevelSpec
from sam_cache.types import ImageRecord

LEVEL = "neck"
CODECS = ("raw", "blosc", "zstd")
AT_ONCE = 8  # rows read together
SCRATCH = ".trial-"  # how folders of trials begin


@dataclass(frozen=True)
class Values:
    """How the values of a level are stored; what codec then packs the bytes loses nothing more."""

    dtype: str
    keep_bits: int | None = None

    @property
    def name(self) -> str:
        return self.dtype if self.keep_bits is None else f"{self.dtype} keep {self.keep_bits}"

    def level(self, shape: tuple[int, int, int], codec: str) -> LevelSpec:
        return LevelSpec(*shape, self.dtype, codec, self.keep_bits)

    def flags(self, codec: str) -> str:
        """The flags of `samcache embed` that store so."""
        kept = "" if self.keep_bits is None else f" --keep-bits {self.keep_bits}"
        return f"--dtype {self.dtype}{kept}" + (f" --codec {codec}" if codec != "raw" else "")


EXACT = Values("fp32")
CANDIDATES = (EXACT, Values("fp16"), Values("bf16"), Values("int8"), *(Values("fp16", keep) for keep in (7, 5, 3)))


def sample_rows(store: EmbeddingStore, most: int) -> torch.Tensor:
    """The first rows that are whole, (rows, C, H, W) in storage type."""
    rows = store.images.rows[store.row_states[store.images.rows] == OK][:most]
    out = store.reader((LEVEL,)).empty(len(rows))
    store.reader((LEVEL,)).read(rows, out)
    return out[LEVEL]


def try_codec(exact: EmbeddingStore, given: torch.Tensor, values: Values, codec: str, folder: Path) -> dict:
    """Store `given`, rows of `exact`, in a store of their own and read them again.

        {"bytes_per_row", "write_rows_per_s", "read_rows_per_s", "error"} or {"failed": rows that do not fit}

    Writing goes from fp32 in memory to files that are synced, reading from the page cache, verified, into a buffer
    that is reused. `error` is the norm of the difference over the norm of what was given.
    """
    spec = replace(exact.spec, levels={LEVEL: values.level(exact.spec.levels[LEVEL].shape, codec)})
    records = [ImageRecord(number, str(number)) for number in range(len(given))]
    with TemporaryDirectory(prefix=SCRATCH, dir=folder) as scratch:
        nothing = {"row": np.zeros(0, np.int64)}
        path = Path(scratch, "trial.zarr")
        store = EmbeddingStore.create_or_resume(path, spec, records, lambda _: nothing, b"none", {}, {})
        started = time.perf_counter()
        failed = write_rows(store, given)
        seconds_in = time.perf_counter() - started
        if failed:
            return {"failed": failed}
        read_all(store, len(given))  # what is read for the first time takes longer
        seconds_out, error = read_all(store, len(given)), error_of(store, given)
        return {
            "bytes_per_row": sum(store.bytes_on_disk().values()) / len(given),
            "write_rows_per_s": len(given) / seconds_in,
            "read_rows_per_s": len(given) / seconds_out,
            "error": error,
        }


def write_rows(store: EmbeddingStore, given: torch.Tensor) -> int:
    """Write all shards; returns how many rows the type cannot hold."""
    failed = 0
    for shard in store.uncommitted():
        with store.writing(shard) as writer:
            failed += sum(not writer.append(row, {LEVEL: given[row]}, "") for row in shard.rows)
    return failed


def parts_of(rows: int) -> list[range]:
    return [range(first, min(first + AT_ONCE, rows)) for first in range(0, rows, AT_ONCE)]


def read_all(store: EmbeddingStore, rows: int) -> float:
    """Seconds to read all rows, some at a time."""
    reader = store.reader((LEVEL,))
    out = reader.empty(AT_ONCE)
    for tensor in out.values():
        tensor.zero_()  # memory that is touched for the first time would count as reading
    started = time.perf_counter()
    for part in parts_of(rows):
        reader.read(part, {name: tensor[: len(part)] for name, tensor in out.items()})
    return time.perf_counter() - started


def error_of(store: EmbeddingStore, given: torch.Tensor) -> float:
    reader = store.reader((LEVEL,))
    squares = norm = 0.0
    for part in parts_of(len(given)):
        out = reader.empty(len(part))
        reader.read(part, out)
        expected = given[part.start : part.stop].float()
        squares += float((dequantise(out, LEVEL).float() - expected).double().square().sum())
        norm += float(expected.double().square().sum())
    return (squares / norm) ** 0.5


def copy_as(exact: EmbeddingStore, values: Values, path: Path, splits: Sequence[str]) -> tuple[EmbeddingStore, int]:
    """A store of the same images and objects whose rows are of type `values`; and how many of them do not fit.

    No encoder runs. `splits` say of each image on which side it is. What an interruption left is finished.
    """
    images = exact.images
    columns = zip(images.ids, images.paths, images.heights, images.widths, splits, images.views, strict=True)
    moved = images.transforms.reshape(len(images), 6).tolist()
    records = [
        ImageRecord(int(id), str(name), int(height), int(width), split, str(view), tuple(transform))
        for (id, name, height, width, split, view), transform in zip(columns, moved, strict=True)
    ]
    spec = replace(exact.spec, levels={LEVEL: values.level(exact.spec.levels[LEVEL].shape, "raw")})
    store = EmbeddingStore.create_or_resume(
        path, spec, records, lambda _: exact.objects(), exact.base, exact.recorded, exact.object_attributes()
    )
    reader, failures, contents = exact.reader((LEVEL,)), dict(exact.failures()), exact.content_hashes
    out = reader.empty(1)
    for shard in store.uncommitted():
        with store.writing(shard) as writer:
            for row in shard.rows:
                if row in failures:
                    writer.fail(row, failures[row])
                elif row not in writer.kept:
                    reader.read([row], out)
                    writer.append(row, {LEVEL: out[LEVEL][0]}, contents[row].decode())
    return store, len(store.failures()) - len(failures)
