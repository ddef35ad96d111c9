"""One level of one shard: a file that grows row by row and is then placed for good."""

import errno
import os
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np

from sam_cache import durable
from sam_cache.store.layout import CHECKSUM_BYTES, Extent, decode_index, encode_index, index_size


@dataclass(frozen=True)
class ShardFile:
    """What the ledger says about a placed file. `extents` has one entry per row of the shard.

    That is every byte of it: rows by their crc32c, zeros between them, and the index, which the extents are.
    """

    size: int
    extents: list[Extent | None]

    def to_json(self) -> dict:
        return {"size": self.size, "extents": self.extents}


class PartialFile:
    """A shard file in the making. Memory is one row.

    Rows are appended in any order; the same rows in the same order give the same bytes.
    """

    def __init__(self, path: Path, shard_rows: int):
        self.path = path
        self.extents: list[Extent | None] = [None] * shard_rows
        self.offset = 0
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)

    def close(self) -> None:
        os.close(self._descriptor)

    def find(self, extent: Extent) -> bool:
        """Whether the next row of an interrupted run is whole there, up to where another may start."""
        data = os.pread(self._descriptor, extent.end - self.offset, self.offset)
        whole = extent.offset == self.offset and len(data) == extent.end - self.offset
        return whole and row_checksum(data[: extent.length]) == extent.checksum

    def keep(self, position: int, extent: Extent) -> None:
        """Count what `find` has found as written."""
        self._advance(position, extent)

    def drop_rest(self, room: int | None = None) -> None:
        """Cut off what follows the kept rows, and take what a file of `room` bytes needs of the disk at once.

        Writing into room that is there is cheaper than having it sought row by row, by about a third of the
        processor time on ext4. A new file is not cut: ext4 would take it for one that is replaced, and start to
        write its bytes out when it is closed.
        """
        if os.fstat(self._descriptor).st_size > self.offset:
            os.ftruncate(self._descriptor, self.offset)
        if room is not None and room > self.offset and hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self._descriptor, self.offset, room - self.offset)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # file systems that cannot
                    raise

    def append(self, position: int, encoded: np.ndarray) -> Extent:
        """Write one row, its crc32c and the gap to the next page."""
        checksum = google_crc32c.value(encoded)
        extent = Extent(self.offset, encoded.nbytes + CHECKSUM_BYTES, checksum)
        gap = bytes(extent.end - extent.offset - extent.length)
        pieces = (encoded, checksum.to_bytes(CHECKSUM_BYTES, "little") + gap)
        offset = self.offset
        for piece in pieces:
            offset += _write(self._descriptor, piece, offset)
        self._advance(position, extent)
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
        return ShardFile(size, self.extents)

    def _advance(self, position: int, extent: Extent) -> None:
        self.extents[position] = extent
        self.offset = extent.end


def examine(path: Path, shard_rows: int) -> ShardFile:
    """Read a placed file whole; ValueError, with the reason, when any of it is damaged."""
    extents: list[Extent | None] = [None] * shard_rows
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size < index_size(shard_rows):
            raise ValueError(f"it has {size} bytes, less than its index")
        file.seek(size - index_size(shard_rows))
        for position, entry in enumerate(decode_index(file.read())):
            if entry:
                offset, length = entry
                if not CHECKSUM_BYTES <= length <= offset + length <= size:
                    raise ValueError(f"row {position} of the shard lies outside it")
                file.seek(offset + length - CHECKSUM_BYTES)
                extents[position] = Extent(offset, length, int.from_bytes(file.read(CHECKSUM_BYTES), "little"))
    damaged, rest_whole = compare(path, extents)
    if damaged:
        raise ValueError(f"row {damaged[0]} of the shard does not match its checksum")
    if not rest_whole:
        raise ValueError("its rows are whole, but its index or what lies between them is not")
    return ShardFile(size, extents)


def compare(path: Path, extents: list[Extent | None]) -> tuple[list[int], bool]:
    """Read a placed file whole: the rows that do not match their checksum, and whether all else is zeros and index."""
    damaged, rest_whole = [], True
    written = sorted((extent, position) for position, extent in enumerate(extents) if extent)
    with open(path, "rb") as file:
        for extent, position in written:
            rest_whole &= not file.read(max(0, extent.offset - file.tell())).strip(b"\0")
            if row_checksum(file.read(extent.length)) != extent.checksum:
                damaged.append(position)
        rest, index = file.read(), encode_index(extents)
        # Other libraries leave no gap before the index; how large it is, the size of the file says.
        rest_whole &= rest.endswith(index) and not rest.removesuffix(index).strip(b"\0")
    return damaged, rest_whole


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
