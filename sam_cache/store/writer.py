"""Writing one shard: rows stream into partial files, which are placed, then recorded.

    ledger/partial/shard-000000.neck       the shard's file of array `neck`, in the making
    ledger/partial/shard-000000.journal    one line per row that stands in every array's file; also the lock

An interrupted shard keeps both, and the next writer goes on after the last whole row.
"""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import google_crc32c
import numpy as np
import torch

from sam_cache import durable
from sam_cache.errors import StoreError
from sam_cache.store.codecs import encode, to_stored
from sam_cache.store.layout import Extent, raw_file_size, shard_path
from sam_cache.store.ledger import damage, record_name, seal
from sam_cache.store.row_index import FAILED, HOLE, OK
from sam_cache.store.shard_file import PartialFile, ShardFile, examine
from sam_cache.store.spec import Shard, StoreSpec


class ShardBusy(StoreError):
    """Another process writes this shard, or has just committed it: go on with the next one."""


def partial_path(root: Path, shard: int, suffix: str) -> Path:
    return root / "ledger" / "partial" / f"shard-{shard:06d}.{suffix}"


@contextmanager
def locked_journal(root: Path, shard: int) -> Iterator[int]:
    """The descriptor of the shard's journal, held by this process alone; ShardBusy if it is taken."""
    path = partial_path(root, shard, "journal")
    durable.make_folders(path.parent)
    with ExitStack() as stack:
        try:
            descriptor = stack.enter_context(durable.locked(path, wait=False))
        except BlockingIOError:
            raise ShardBusy(f"{root}: shard {shard} is being written by another process") from None
        yield descriptor


def discard_partial(root: Path, spec: StoreSpec, shard: int) -> None:
    """Remove what a committed shard no longer needs, the lock last."""
    for suffix in (*spec.arrays, "journal"):
        partial_path(root, shard, suffix).unlink(missing_ok=True)


class ShardWriter:
    """Takes the rows of one shard, in any order, each once: by `append` or by `fail`.

    `kept` are the rows that an interrupted run has left whole: they need not be computed again.
    Where an array's file of this shard stands already (the last run died just before its
    record), that file is what counts: it is verified, and never replaced.
    """

    def __init__(self, root: Path, spec: StoreSpec, store_digest: str, shard: Shard, journal: int):
        self.kept: set[int] = set()
        self._root = root
        self._spec = spec
        self._store_digest = store_digest
        self._shard = shard
        self._journal = journal
        self._contents: dict[int, str] = {}
        self._failures: dict[int, str] = {}
        self._files = self._open_files()
        try:
            self._resume()
        except BaseException:
            self.close()
            raise

    def append(self, row: int, values: dict[str, np.ndarray | torch.Tensor], content: str) -> bool:
        """Store one row: every level's (C, H, W) values, of any floating type, on any device.

        int8 levels are quantised here, on the device of their values.
        `content` is the sha256, in hex, of the image file's bytes. A row that is not finite, or
        that the storage type cannot hold, becomes a failed row: returns False, else True.
        """
        position = self._position(row)
        encoded = {}
        for name, level in self._spec.levels.items():
            if tuple(values[name].shape) != level.shape:
                raise ValueError(f"level {name} of row {row} is {tuple(values[name].shape)}, not {level.shape}")
            try:
                stored = to_stored(values[name], name, level)
            except ValueError as reason:
                self.fail(row, f"{reason} of level {name}")
                return False
            encoded |= {array: encode(stored[array], spec) for array, spec in level.arrays(name).items()}
        extents = {
            name: file.append(position, encoded[name])
            for name, file in self._files.items()
            if isinstance(file, PartialFile)
        }
        os.write(self._journal, _journal_line({"row": int(row), "content": content, "levels": extents}))
        self._contents[row] = content
        return True

    def fail(self, row: int, message: str) -> None:
        """Mark a row whose image cannot be used. It reads as a failure, never as values."""
        self._position(row)
        self._failures[row] = " ".join(message.split())

    def finish(self) -> dict:
        """Place the files, then the record; returns the record. StoreError if rows are missing."""
        missing = sorted({*self._shard.rows} - {*self._contents} - {*self._failures})
        if missing:
            raise StoreError(
                f"{self._root}: shard {self._shard.index} got no value and no failure for rows {missing}; "
                "give each of its rows to append() or fail()"
            )
        files = {name: self._place(name) for name in self._files}
        record = self._record(files)
        name = record_name("shard", self._shard.index)
        if not durable.place(self._root / "ledger" / name, seal(record)):
            raise ShardBusy(f"{self._root}: shard {self._shard.index} was committed by another process")
        discard_partial(self._root, self._spec, self._shard.index)
        return record

    def close(self) -> None:
        for file in self._files.values():
            if isinstance(file, PartialFile):
                file.close()

    def _position(self, row: int) -> int:
        if row not in self._shard.rows or row in self._contents or row in self._failures:
            raise ValueError(f"row {row} is not of shard {self._shard.index}, or was given before")
        return row - self._shard.index * self._spec.shard_rows

    def _open_files(self) -> dict[str, PartialFile | ShardFile]:
        placed = {
            name: self._examine(name)
            for name in self._spec.arrays
            if (self._root / shard_path(name, self._shard.index)).exists()
        }
        files = {}
        for name in self._spec.arrays:
            partial = partial_path(self._root, self._shard.index, name)
            if name in placed:
                # The partial may be another name of the very same file: never write to it again.
                partial.unlink(missing_ok=True)
            files[name] = placed.get(name) or PartialFile(partial, self._spec.shard_rows)
        return files

    def _examine(self, name: str) -> ShardFile:
        path = shard_path(name, self._shard.index)
        try:
            return examine(self._root / path, self._spec.shard_rows)
        except ValueError as reason:
            raise damage(self._root, f"{path} was never committed and is damaged: {reason}") from None

    def _resume(self) -> None:
        """Keep the leading journal lines whose rows are whole in every array's file."""
        whole = 0
        with open(self._journal, "rb", closefd=False) as journal:
            for line in journal:
                entry = _parse_journal_line(line)
                if entry is None or not self._keep(entry):
                    break
                whole += len(line)
        os.ftruncate(self._journal, whole)
        os.lseek(self._journal, whole, os.SEEK_SET)
        for name, file in self._files.items():
            if isinstance(file, PartialFile):
                file.drop_rest(raw_file_size(self._spec.arrays[name], len(self._shard.rows), self._spec.shard_rows))

    def _keep(self, entry: dict) -> bool:
        position = self._position(entry["row"])
        extents = {name: Extent(*extent) for name, extent in entry["levels"].items()}
        partial = {}
        for name, file in self._files.items():
            if isinstance(file, ShardFile):
                if file.extents[position] is None:
                    return False
            elif name not in extents or not file.find(extents[name]):
                return False
            else:
                partial[name] = file
        for name, file in partial.items():
            file.keep(position, extents[name])
        self.kept.add(entry["row"])
        self._contents[entry["row"]] = entry["content"]
        return True

    def _place(self, name: str) -> ShardFile:
        file = self._files[name]
        if isinstance(file, ShardFile):
            return file
        try:
            return file.place(self._root / shard_path(name, self._shard.index))
        except ValueError:
            return self._examine(name)

    def _record(self, files: dict[str, ShardFile]) -> dict:
        first, size = self._shard.index * self._spec.shard_rows, self._spec.shard_rows
        states, contents, failures = [HOLE] * size, [""] * size, {}
        for row in self._shard.rows:
            position = row - first
            if all(file.extents[position] for file in files.values()):
                states[position], contents[position] = OK, self._contents.get(row, "")
            else:
                states[position] = FAILED
                failures[str(position)] = self._failures.get(row, "absent from the shard file that stood here")
        return {
            "key": self._shard.index,
            "store": self._store_digest,
            "states": states,
            "contents": contents,
            "failures": failures,
            "levels": {name: file.to_json() for name, file in files.items()},
        }


def _journal_line(entry: dict) -> bytes:
    text = json.dumps(entry).encode()
    return b"%08x %b\n" % (google_crc32c.value(text), text)


def _parse_journal_line(line: bytes) -> dict | None:
    """None for a line that a crash has torn."""
    checksum, _, text = line.partition(b" ")
    whole = text.endswith(b"\n") and checksum == b"%08x" % google_crc32c.value(text[:-1])
    return json.loads(text) if whole else None
