"""One level of one shard: a file that grows row by row and is then placed for good."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import google_crc32c
import numpy as np

from sam_cache import durable
from sam_cache.store.layout import CHECKSUM_BYTES, Extent, decode_index, encode_index, index_size


@dataclass(frozen=True)
class ShardFile:
    """What the ledger says about a placed file. `extents` has one entry per row of the shard."""

    size: int
    sha256: str
    extents: list[Extent | None]

    def to_json(self) -> dict:
        return {"size": self.size, "sha256": self.sha256, "extents": self.extents}

    @classmethod
    def from_json(cls, record: dict) -> "ShardFile":
        return cls(record["size"], record["sha256"], [Extent(*e) if e else None for e in record["extents"]])


class PartialFile:
    """A shard file in the making. Memory is one row.

    Rows are appended in any order; the same rows in the same order give the same bytes. The
    digest follows along, over kept rows too.
    """

    def __init__(self, path: Path, shard_rows: int):
        self.path = path
        self.extents: list[Extent | None] = [None] * shard_rows
        self.offset = 0
        self._digest = hashlib.sha256()
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)

    def close(self) -> None:
        os.close(self._descriptor)

    def find(self, extent: Extent) -> bytes | None:
        """The bytes of a row of an interrupted run, up to the next row; None if not whole."""
        data = os.pread(self._descriptor, extent.end - self.offset, self.offset)
        whole = extent.offset == self.offset and len(data) == extent.end - self.offset
        return data if whole and row_checksum(data[: extent.length]) == extent.checksum else None

    def keep(self, position: int, extent: Extent, data: bytes) -> None:
        """Count what `find` returned as written."""
        self._advance(position, extent, data)

    def drop_rest(self) -> None:
        """Cut off what follows the kept rows."""
        os.ftruncate(self._descriptor, self.offset)

    def append(self, position: int, encoded: np.ndarray) -> Extent:
        """Write one row, its crc32c and the gap to the next page."""
        checksum = google_crc32c.value(encoded)
        extent = Extent(self.offset, encoded.nbytes + CHECKSUM_BYTES, checksum)
        gap = bytes(extent.end - extent.offset - extent.length)
        pieces = (encoded, checksum.to_bytes(CHECKSUM_BYTES, "little") + gap)
        offset = self.offset
        for piece in pieces:
            offset += _write(self._descriptor, piece, offset)
        self._advance(position, extent, *pieces)
        return extent

    def place(self, target: Path) -> ShardFile:
        """Write the index and give the file its final name.

        A file that has that name already is never replaced: it is read, and what it holds is
        returned instead. Raises ValueError when that file is damaged.
        """
        index = encode_index(self.extents)
        size = self.offset + _write(self._descriptor, index, self.offset)
        os.ftruncate(self._descriptor, size)
        os.fsync(self._descriptor)
        durable.make_folders(target.parent)
        try:
            os.link(self.path, target)
        except FileExistsError:
            return examine(target, len(self.extents))
        durable.fsync(target.parent)
        digest = self._digest.copy()
        digest.update(index)
        return ShardFile(size, digest.hexdigest(), self.extents)

    def _advance(self, position: int, extent: Extent, *pieces: bytes | np.ndarray) -> None:
        for piece in pieces:
            self._digest.update(piece)
        self.extents[position] = extent
        self.offset = extent.end


def examine(path: Path, shard_rows: int) -> ShardFile:
    """Read a placed file whole; ValueError, with the reason, when any of it is damaged."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size < index_size(shard_rows):
            raise ValueError(f"it has {size} bytes, less than its index")
        file.seek(size - index_size(shard_rows))
        entries = decode_index(file.read())
        file.seek(0)
        extents: list[Extent | None] = [None] * shard_rows
        digest = hashlib.sha256()
        for position in sorted((p for p, entry in enumerate(entries) if entry), key=lambda p: entries[p]):
            offset, length = entries[position]
            data = read_row(file, offset, length, digest)
            checksum = int.from_bytes(data[-CHECKSUM_BYTES:], "little")
            if row_checksum(data) != checksum:
                raise ValueError(f"row {position} of the shard does not match its checksum")
            extents[position] = Extent(offset, length, checksum)
        digest.update(file.read())
    return ShardFile(size, digest.hexdigest(), extents)


def read_row(file: BinaryIO, offset: int, length: int, digest) -> bytes:
    """Read on, through the gap, to the end of a row; every byte goes into `digest`."""
    digest.update(file.read(max(0, offset - file.tell())))
    data = file.read(length)
    digest.update(data)
    return data


def row_checksum(data: bytes) -> int | None:
    """The crc32c that follows the row's bytes if it fits them, else None."""
    # A slice of an array is a view, where a slice of bytes would be a copy of the row.
    checksum = google_crc32c.value(np.frombuffer(data, np.uint8)[:-CHECKSUM_BYTES])
    return checksum if checksum.to_bytes(CHECKSUM_BYTES, "little") == data[-CHECKSUM_BYTES:] else None


def _write(descriptor: int, data: bytes | np.ndarray, offset: int) -> int:
    view = memoryview(data).cast("B")
    written = 0
    while written < len(view):
        written += os.pwrite(descriptor, view[written:], offset + written)
    return written
