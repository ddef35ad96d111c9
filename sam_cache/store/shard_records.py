"""Records of shards: one JSON file each as they are committed, later gathered as columns.

    compact.json           names the file of columns, its digest and the store, and is sealed as every record
    compact-0123abcd.npy   an entry per shard, a field per column of `RowIndex.to_table`

A million rows are columns of 49 MB, read at the speed of the disk; as JSON they were 150 MB to parse.
Stores of earlier versions have the records themselves in `compact.json`, until they are compacted again.
"""

import hashlib
import io
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sam_cache import durable
from sam_cache.store.ledger import Report, changed, digest, read_record, read_records, record_name, seal
from sam_cache.store.row_index import RowIndex

COMPACT = "compact.json"


@dataclass
class Compaction:
    """What was gathered: a `table` with its `failures` by row, or, by an earlier version, `records` by shard.

    `store` is the digest of the store that the table belongs to, `file` its name below the store's folder;
    `signature` tells one compaction from the next.
    """

    records: dict[int, dict] = field(default_factory=dict)
    table: np.ndarray | None = None
    failures: dict[int, str] = field(default_factory=dict)
    store: str = ""
    file: str = ""
    signature: tuple[int, int] | None = None

    def fill(self, index: RowIndex, store: str | None, report: Report) -> set[int]:
        """Give everything to `index`; returns the shards whose records are of another store: they go to `report`."""
        foreign = {key for key, record in self.records.items() if not _take(record, index, store, report)}
        if self.table is not None and store in (self.store, None):
            index.add_table(self.table, self.failures)
        elif self.table is not None:
            report(f"ledger/{COMPACT} is of another store")
        return foreign


def fill_index(root: Path, index: RowIndex, store: str | None, report: Report) -> tuple[Compaction, set[int]]:
    """Give `index` every shard record below `root` that is of `store`, a digest, or of any if that is unknown.

    What is damaged or of another store goes to `report`. Returns the compaction, and the shards of which only
    a record of another store is there. Shards beyond the last one of `index` are ignored: another process may
    have grown the store meanwhile.
    """
    # Single records first, the compaction last: `write_compaction` writes it before they are removed. One after the
    # other goes into the index: thousands of them, held at once, take long to collect as garbage.
    foreign = {key for key, record in read_records(root, "shard", report) if not _take(record, index, store, report)}
    compaction = read_compaction(root, report)
    return compaction, foreign | compaction.fill(index, store, report)


def outline(root: Path, store: str | None) -> RowIndex:
    """An empty index, just large enough for the shard records below `root`, whatever the store's metadata says."""
    arrays, shards, rows = {}, 0, 0
    compaction = read_compaction(root, _ignore)
    for records in (read_records(root, "shard", _ignore), compaction.records.items()):
        for key, record in records:
            if store in (record["store"], None):
                arrays |= dict.fromkeys(record["levels"])
                shards, rows = max(shards, key + 1), max(rows, len(record["states"]))
    if (table := compaction.table) is not None and store in (compaction.store, None):
        arrays |= {name.removesuffix(".size"): None for name in table.dtype.names if name.endswith(".size")}
        shards, rows = max(shards, int(table["shard"].max(initial=-1)) + 1), max(rows, table.dtype["state"].shape[0])
    return RowIndex(arrays, shards, rows)


def read_compaction(root: Path, report: Report) -> Compaction:
    """What was gathered; without any, or where it is damaged and `report` returns, nothing."""
    while True:
        signature = signature_of_compaction(root)
        record = read_record(root / "ledger" / COMPACT, report)
        if record is None or "shards" in record:
            records = record["shards"] if record else []
            return Compaction({each["key"]: each for each in records}, signature=signature)
        damage, table = [f"{record['file']} is missing"], None
        with suppress(FileNotFoundError):
            damage = [*changed(root, {record["file"]: record["digest_of_file"]})]
            table = None if damage else np.load(root / record["file"])
        # Another process may have replaced and removed it meanwhile: then there is a newer one.
        if table is not None or signature == signature_of_compaction(root):
            break
    for what in damage:
        report(what)
    failures = {int(row): message for row, message in record["failures"].items()}
    return Compaction({}, table, failures, record["store"], record["file"], signature)


def write_compaction(root: Path, index: RowIndex, store: str) -> None:
    """Gather what `index` holds as committed; the caller holds the store's lock.

    It counts from the moment that `compact.json` is replaced; columns that it does not name are swept. The
    name of the columns comes from their content, so that the same records make the same files.
    """
    columns = io.BytesIO()
    np.save(columns, index.to_table())
    path = root / "ledger" / f"compact-{hashlib.sha256(columns.getbuffer()).hexdigest()[:8]}.npy"
    durable.replace(path, columns.getbuffer())
    committed = {row: message for row, message in index.failures.items() if index.committed[row // index.shard_rows]}
    record = {
        "store": store,
        "file": f"ledger/{path.name}",
        "digest_of_file": digest(path),
        "failures": {str(row): message for row, message in committed.items()},
    }
    durable.replace(root / "ledger" / COMPACT, seal(record))
    for name in old_columns(root, record["file"]):
        (root / name).unlink()


def old_columns(root: Path, current: str) -> list[str]:
    """Files of columns that are superseded, or that an interrupted compaction left."""
    names = sorted(f"ledger/{path.name}" for path in (root / "ledger").glob("compact-*.npy"))
    return [name for name in names if name != current]


def signature_of_compaction(root: Path) -> tuple[int, int] | None:
    try:
        status = (root / "ledger" / COMPACT).stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _take(record: dict, index: RowIndex, store: str | None, report: Report) -> bool:
    """Whether the record is of `store`."""
    if store not in (record["store"], None):
        report(f"ledger/{record_name('shard', record['key'])} is of another store")
        return False
    if record["key"] < len(index.committed):
        index.add(record)
    return True


def _ignore(what: str) -> None:
    """For those who read again what was reported before."""
