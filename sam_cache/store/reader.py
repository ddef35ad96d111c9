"""Reading rows: the hot path. Straight from the file into a tensor that is reused."""

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import google_crc32c
import numpy as np
import torch

from sam_cache.errors import DamageError, StoreError
from sam_cache.store.codecs import as_bytes, decode
from sam_cache.store.layout import CHECKSUM_BYTES, shard_path
from sam_cache.store.row_index import OK, RowIndex
from sam_cache.store.spec import LevelSpec, StoreSpec

OPEN_FILES = 128
AHEAD = 4  # rows that the disk fetches at once; with one at a time it idles while a row is copied and checked


class RowReader:
    """Reads rows of some levels. Any number of threads may share one reader.

    Where a row lies comes from the ledger, and its checksum is compared with what the ledger
    says and with what follows the row, so that not even a stale or swapped file passes. Without
    `verify` neither is looked at: a third faster from the page cache, but damage reads as values.
    """

    def __init__(self, root: Path, spec: StoreSpec, index: RowIndex, levels: Sequence[str], verify: bool = True):
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
        self._verify = verify
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
        rows = np.asarray(rows, np.int64)
        self._expect_ok(rows)
        for name, array in self._arrays.items():
            values = as_bytes(out[name].view(-1)).reshape(len(out[name]), array.nbytes)
            self._read_array(name, array, rows, values)

    def _expect_ok(self, rows: np.ndarray) -> None:
        states = self._index.states
        inside = (rows >= 0) & (rows < len(states))
        if inside.all() and (states[rows] == OK).all():
            return
        row = next(row for row in rows.tolist() if not 0 <= row < len(states) or states[row] != OK)
        raise StoreError(
            f"{self._root}: row {row} cannot be read: {self._index.describe(row)}; ask only for rows whose state is ok"
        )

    def _read_array(self, name: str, array: LevelSpec, rows: np.ndarray, values: np.ndarray) -> None:
        shards, extents = (rows // self._shard_rows).tolist(), self._index.extents[name][rows].tolist()
        announced = 0

        def announce(place: int) -> None:
            """Let the disk begin with the rows after `place`, while that one is waited for, checked and decoded."""
            nonlocal announced
            for later in range(max(announced, place + 1), min(place + 1 + AHEAD, len(shards))):
                with suppress(FileNotFoundError):
                    self._open(name, shards[later]).announce(*extents[later][:2])
            announced = max(announced, place + 1 + AHEAD)

        stored, raw = bytearray(CHECKSUM_BYTES), array.codec == "raw"
        for place, (shard, (offset, length, checksum)) in enumerate(zip(shards, extents, strict=True)):
            target, size = values[place], length - CHECKSUM_BYTES
            encoded = target if raw else self._scratch_bytes(size)
            buffers, size = ((encoded, stored), length) if self._verify else ((encoded,), size)
            try:
                file = self._open(name, shard)
            except FileNotFoundError:
                raise self._damage(name, int(rows[place]), "is gone: its file is missing") from None
            if not file.fill_from_memory(buffers, offset, size):
                announce(place)
                if not file.fill(buffers, offset, size):
                    raise self._damage(name, int(rows[place]), "is cut off: its file is too short")
            if self._verify and not google_crc32c.value(encoded) == checksum == int.from_bytes(stored, "little"):
                raise self._damage(name, int(rows[place]), "is damaged: its bytes do not match their checksum")
            if not raw:
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

    def announce(self, offset: int, length: int) -> None:
        """Have the system fetch these bytes in its own time; where it cannot be told, nothing happens."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), offset, length, os.POSIX_FADV_WILLNEED)

    def fill_from_memory(self, buffers: Sequence[np.ndarray | bytearray], offset: int, size: int) -> bool:
        """Fill the buffers, `size` bytes, one after the other from `offset` on, if that needs no waiting."""
        try:
            return os.preadv(self._file.fileno(), buffers, offset, os.RWF_NOWAIT) == size
        except (OSError, AttributeError):  # not in memory, or the system cannot say
            return False

    def fill(self, buffers: Sequence[np.ndarray | bytearray], offset: int, size: int) -> bool:
        """Fill the buffers, from the disk if need be; False if the file ends before."""
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
