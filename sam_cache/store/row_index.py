"""What the ledger says about every row and every shard file, as arrays."""

from collections.abc import Iterable

import numpy as np

from sam_cache.store.layout import Extent
from sam_cache.store.shard_file import ShardFile

ABSENT, OK, FAILED, HOLE = range(4)
STATES = ("not committed yet", "ok", "failed", "a hole: no image has this row")
DIGEST_BYTES = 32
NO_DIGEST = "00" * DIGEST_BYTES
EXTENT = np.dtype([("offset", "<i8"), ("length", "<u4"), ("checksum", "<u4")])
HEX = np.frombuffer(b"".join(b"%02x" % byte for byte in range(256)), "S2")


class RowIndex:
    """States, content hashes and extents of all rows, shard after shard.

    `contents` is (rows, 32) uint8, a sha256 each, zeros where there is none. `extents[array]` are
    (offset, length with its checksum, crc32c) per row, of length 0 where the row is not there, and
    `sizes[array]` the bytes of each shard file.
    """

    def __init__(self, arrays: Iterable[str], shards: int, shard_rows: int):
        rows = shards * shard_rows
        self.shard_rows = shard_rows
        self.committed = np.zeros(shards, bool)
        self.states = np.full(rows, HOLE, np.uint8)
        self.contents = np.zeros((rows, DIGEST_BYTES), np.uint8)
        self.extents = {array: np.zeros(rows, EXTENT) for array in arrays}
        self.sizes = {array: np.zeros(shards, np.int64) for array in self.extents}
        self.failures: dict[int, str] = {}

    def add(self, record: dict) -> None:
        """Take in a shard's record; a second record of the same shard is ignored."""
        shard = record["key"]
        if self.committed[shard]:
            return
        first = shard * self.shard_rows
        rows = slice(first, first + self.shard_rows)
        self.states[rows] = record["states"]
        self.contents[rows] = _from_hex(record["contents"])
        self.failures |= {first + int(row): message for row, message in record["failures"].items()}
        for array, entry in record["levels"].items():
            self.extents[array][rows] = [tuple(extent or (0, 0, 0)) for extent in entry["extents"]]
            self.sizes[array][shard] = entry["size"]
        self.committed[shard] = True

    def add_table(self, table: np.ndarray, failures: dict[int, str]) -> None:
        """Take in what `to_table` gave, of this store or of a smaller or larger state of it.

        Shards that are known already, or that lie beyond the last one, are ignored.
        """
        shards, known = table["shard"], self.committed.copy()
        new = shards < len(known)
        new[new] = ~known[shards[new]]
        table = table if new.all() else table[new]
        if not len(table):  # one of no shards at all has no columns for the arrays either
            return
        for name, column in self._columns():
            column[table["shard"]] = table[name]
        self.committed[table["shard"]] = True
        taken = {*np.flatnonzero(self.committed & ~known).tolist()}
        self.failures |= {row: text for row, text in failures.items() if row // self.shard_rows in taken}

    def to_table(self) -> np.ndarray:
        """Everything about the committed shards but `failures`: one entry per shard, a field per column."""
        columns = dict(self._columns())
        fields = [(name, column.dtype.str, column.shape[1:]) for name, column in columns.items()]
        table = np.empty(self.committed.sum(), [("shard", "<i8"), *fields])
        table["shard"] = np.flatnonzero(self.committed)
        for name, column in columns.items():
            table[name] = column[self.committed]
        return table

    def file(self, array: str, shard: int) -> ShardFile:
        first = shard * self.shard_rows
        extents = self.extents[array][first : first + self.shard_rows].tolist()
        return ShardFile(
            size=int(self.sizes[array][shard]),
            extents=[Extent(*extent) if extent[1] else None for extent in extents],
        )

    def content_hashes(self) -> np.ndarray:
        """`contents` in hex, as `S64`, empty where there is none."""
        found = HEX[self.contents].view("S64")[:, 0]
        found[~self.contents.any(1)] = b""
        return found

    def describe(self, row: int) -> str:
        """Why a row cannot be read."""
        if not 0 <= row < len(self.states):
            return f"beyond the last row {len(self.states) - 1}"
        return self.failures.get(row) or STATES[self.states[row]]

    def _columns(self) -> Iterable[tuple[str, np.ndarray]]:
        """All columns but `shard` with their names on disk, as views with one entry per shard."""
        shape = len(self.committed), self.shard_rows
        yield "state", self.states.reshape(shape)
        yield "content", self.contents.reshape(*shape, DIGEST_BYTES)
        for array, extents in self.extents.items():
            for field in EXTENT.names:
                yield f"{array}.{field}", extents[field].reshape(shape)
            yield f"{array}.size", self.sizes[array]


def _from_hex(digests: list[str]) -> np.ndarray:
    """(digests, 32) uint8; zeros for an empty text."""
    raw = bytes.fromhex("".join(digest or NO_DIGEST for digest in digests))
    return np.frombuffer(raw, np.uint8).reshape(len(digests), DIGEST_BYTES)
