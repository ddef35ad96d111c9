"""Reading rows: the hot path. Straight from the file into a tensor that is reused."""

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import google_crc32c
import numpy as np
import torch

from sam_cache.errors import DamageError, StoreError
from sam_cache.store.codecs import as_bytes, decode
from sam_cache.store.layout import CHECKSUM_BYTES, shard_path
from sam_cache.store.row_index import OK, RowIndex
from sam_cache.store.spec import StoreSpec

OPEN_FILES = 128


class RowReader:
    """Reads rows of some levels. Any number of threads may share one reader.

    Where a row lies comes from the ledger, and its checksum is compared with what the ledger
    says and with what follows the row, so that not even a stale or swapped file passes.
    """

    def __init__(self, root: Path, spec: StoreSpec, index: RowIndex, levels: Sequence[str]):
        unknown = [name for name in levels if name not in spec.levels]
        if unknown:
            remedy = ",".join(dict.fromkeys([*spec.levels, *unknown]))
            raise StoreError(
                f"{root}: it has no level {', '.join(unknown)}, only {', '.join(spec.levels)}; "
                f"embed into another --store with the levels you need: --levels {remedy}"
            )
        self._arrays = {array: each for name in levels for array, each in spec.levels[name].arrays(name).items()}
        self._root = root
        self._shard_rows = spec.shard_rows
        self._index = index
        self._files: OrderedDict[tuple[str, int], _OpenFile] = OrderedDict()
        self._lock = threading.Lock()
        self._scratch = threading.local()

    def empty(self, rows: int, pin: bool = False) -> dict[str, torch.Tensor]:
        """Tensors (rows, C, H, W) in storage type, to read into again and again.

        An int8 level NAME comes with NAME_scale and NAME_offset, fp32 (rows, C, 1, 1), for
        `sam_cache.quantisation.dequantise`: a quarter of the bytes of fp32 is what should travel to a device.
        """
        return {
            name: torch.empty((rows, *array.shape), dtype=array.stored.torch_dtype, pin_memory=pin)
            for name, array in self._arrays.items()
        }

    def read(self, rows: Sequence[int], out: dict[str, torch.Tensor]) -> None:
        """Fill `out[name][j]` with row `rows[j]`, for contiguous CPU tensors like `empty` makes.

        Raises StoreError for a row that is not committed, failed, or a hole, and DamageError for
        one whose bytes are not what was committed. `out` is then of no use.
        """
        for row in rows:
            if not 0 <= row < len(self._index.states) or self._index.states[row] != OK:
                raise StoreError(
                    f"{self._root}: row {row} cannot be read: {self._index.describe(row)}; "
                    "ask only for rows whose state is ok"
                )
        for name, array in self._arrays.items():
            values = as_bytes(out[name].view(-1)).reshape(len(out[name]), array.nbytes)
            for row, target in zip(rows, values, strict=False):
                self._read_row(name, int(row), target)

    def _read_row(self, name: str, row: int, target: np.ndarray) -> None:
        offset, length, checksum = self._index.extents[name][row].tolist()
        array = self._arrays[name]
        encoded = target if array.codec == "raw" else self._scratch_bytes(length - CHECKSUM_BYTES)
        stored = bytearray(CHECKSUM_BYTES)
        try:
            whole = self._open(name, row // self._shard_rows).fill((encoded, stored), offset)
        except FileNotFoundError:
            raise self._damage(name, row, "is gone: its file is missing") from None
        if not whole:
            raise self._damage(name, row, "is cut off: its file is too short")
        if not google_crc32c.value(encoded) == checksum == int.from_bytes(stored, "little"):
            raise self._damage(name, row, "is damaged: its bytes do not match their checksum")
        if encoded is not target:
            decode(encoded, array, target)

    def _damage(self, name: str, row: int, what: str) -> DamageError:
        return DamageError(
            f"{self._root}: row {row} of level {name} in {shard_path(name, row // self._shard_rows)} {what}; "
            f"run `samcache verify --store {self._root} --repair`, then embed again"
        )

    def _scratch_bytes(self, size: int) -> np.ndarray:
        """This thread's buffer for encoded bytes: fresh memory would cost more than the read."""
        if getattr(self._scratch, "buffer", np.empty(0)).size < size:
            self._scratch.buffer = np.empty(size, np.uint8)
        return self._scratch.buffer[:size]

    def _open(self, name: str, shard: int) -> "_OpenFile":
        with self._lock:
            file = self._files.pop((name, shard), None) or _OpenFile(self._root / shard_path(name, shard))
            self._files[name, shard] = file
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)
        return file


class _OpenFile:
    """Closed when nobody refers to it any more: a file can leave the cache while a thread reads it."""

    def __init__(self, path: Path):
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        self._lock = threading.Lock()

    def __del__(self):
        if hasattr(self, "_file"):
            self._file.close()

    def fill(self, buffers: Sequence[np.ndarray | bytearray], offset: int) -> bool:
        """Fill the buffers one after the other from `offset` on; False if the file ends before."""
        size = sum(len(buffer) for buffer in buffers)
        if hasattr(os, "preadv") and os.preadv(self._file.fileno(), buffers, offset) == size:
            return True
        return self._fill_plainly(buffers, offset)

    def _fill_plainly(self, buffers: Sequence[np.ndarray | bytearray], offset: int) -> bool:
        """For systems without preadv, and for the rare read that came back short."""
        with self._lock:
            self._file.seek(offset)
            for buffer in buffers:
                rest = memoryview(buffer)
                while len(rest):
                    read = self._file.readinto(rest)
                    if not read:
                        return False
                    rest = rest[read:]
        return True
