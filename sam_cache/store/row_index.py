"""What the ledger says about every row, as arrays."""

from collections.abc import Iterable

import numpy as np

from sam_cache.store.shard_file import ShardFile

ABSENT, OK, FAILED, HOLE = range(4)
STATES = ("not committed yet", "ok", "failed", "a hole: no image has this row")


class RowIndex:
    """States, content hashes and extents of all rows, shard after shard.

    `extents[array]` is (rows, 3) int64: offset, length with its checksum, crc32c.
    """

    def __init__(self, arrays: Iterable[str], shards: int, shard_rows: int):
        rows = shards * shard_rows
        self.shard_rows = shard_rows
        self.states = np.full(rows, HOLE, np.uint8)
        self.contents = np.zeros(rows, "S64")
        self.extents = {array: np.full((rows, 3), -1, np.int64) for array in arrays}
        self.file_sizes = {array: np.zeros(shards, np.int64) for array in self.extents}
        self.failures: dict[int, str] = {}
        self.committed: set[int] = set()

    def add(self, record: dict) -> None:
        """Take in a shard's record; a second record of the same shard is ignored."""
        shard = record["key"]
        if shard in self.committed:
            return
        first = shard * self.shard_rows
        rows = slice(first, first + self.shard_rows)
        self.states[rows] = record["states"]
        self.contents[rows] = [content.encode() for content in record["contents"]]
        self.failures |= {first + int(row): message for row, message in record["failures"].items()}
        for array, entry in record["levels"].items():
            file = ShardFile.from_json(entry)
            self.extents[array][rows] = [extent or (-1, -1, -1) for extent in file.extents]
            self.file_sizes[array][shard] = file.size
        self.committed.add(shard)

    def describe(self, row: int) -> str:
        """Why a row cannot be read."""
        if not 0 <= row < len(self.states):
            return f"beyond the last row {len(self.states) - 1}"
        return self.failures.get(row) or STATES[self.states[row]]
