"""Check a store: ledger against bytes against checksums. Needs nothing but its path."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from sam_cache import durable
from sam_cache.store.embedding_store import EmbeddingStore, expect_store
from sam_cache.store.layout import level_metadata, shard_path
from sam_cache.store.ledger import Ledger, changed, read_ledger, read_record, record_name
from sam_cache.store.prepare import leftovers
from sam_cache.store.row_index import FAILED, OK, RowIndex
from sam_cache.store.shard_file import ShardFile, compare, examine
from sam_cache.store.shard_records import fill_index, old_columns, outline, write_compaction
from sam_cache.store.spec import StoreSpec

Progress = Callable[[int, int], None]
THREADS = 4


@dataclass
class VerifyReport:
    """What `verify` found. Only `damage` is damage.

    `damaged_rows` are (level, row, file); each is in `damage` too, beside damage to whole files
    and records. `uncommitted` shards wait for the next embed, which also takes in `orphans`:
    whole shard files without a record. `leftovers` are what interrupted runs have left and later
    ones use or remove. `repaired` shards were removed, to be embedded again.
    """

    store: str
    damage: list[str] = field(default_factory=list)
    damaged_rows: list[tuple[str, int, str]] = field(default_factory=list)
    uncommitted: list[int] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    repaired: list[int] = field(default_factory=list)
    shards: int = 0
    rows_ok: int = 0
    rows_failed: int = 0
    files: int = 0
    bytes: int = 0

    @property
    def ok(self) -> bool:
        return not self.damage

    def to_json(self) -> dict:
        return {"ok": self.ok, **asdict(self)}


def verify(
    store: EmbeddingStore | Path | str,
    progress: Progress | None = None,
    repair: bool = False,
    retry_failed: bool = False,
) -> VerifyReport:
    """Read every byte of a store and compare it with what the ledger committed.

    `progress(done, total)` is called as bytes of shards have been read. With `repair` damaged
    shards lose their record and files, and damaged records go, so that the next embed run makes
    just these again; tables, metadata and base weights are beyond repair. `retry_failed` does the
    same to shards with failed rows. Raises StoreError when
    there is no store, or one of a newer format.
    """
    root = store.path if isinstance(store, EmbeddingStore) else Path(store)
    expect_store(root)
    report = VerifyReport(str(root))
    placed = sorted(root.glob(shard_path("*", "*")))  # before the ledger: a record may follow its file
    ledger = read_ledger(root, report.damage.append)
    spec = _read_spec(root)
    _check_files(root, ledger, spec, report)
    store = ledger.prepares[0]["digest"] if 0 in ledger.prepares else None
    index = outline(root, store)
    compaction, bad = fill_index(root, index, store, report.damage.append)
    bad |= _check_shards(root, index, report, progress or (lambda done, total: None))
    if spec:
        bad |= _check_orphans(root, placed, index, spec, report)
        shards = [shard.index for shard in ledger.list_shards(spec.shard_rows)]
        report.uncommitted = [shard for shard in shards if not _holds(index, shard)]
    drafts = [*(root / "ledger").glob("partial/*"), *(root / "ledger").glob(".*.tmp")]
    report.leftovers = leftovers(root, ledger) + sorted(_name(root, path) for path in drafts)
    report.leftovers += old_columns(root, compaction.file)
    bad = bad if repair else set()
    if retry_failed:
        bad |= {*(np.flatnonzero(index.states == FAILED) // max(1, index.shard_rows)).tolist()}
    if store and (bad or (repair and report.damage)):
        _repair(root, store, bad)
        report.repaired = sorted(bad)
    return report


def _holds(index: RowIndex, shard: int) -> bool:
    return shard < len(index.committed) and bool(index.committed[shard])


def _read_spec(root: Path) -> StoreSpec | None:
    try:
        metadata = json.loads((root / "zarr.json").read_bytes())
        return StoreSpec.from_json(metadata["attributes"]["samcache"]["identity"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # damaged: reported with the other files


def _check_files(root: Path, ledger: Ledger, spec: StoreSpec | None, report: VerifyReport) -> None:
    if 0 not in ledger.prepares and not any(record_name("prepare", 0) in what for what in report.damage):
        report.damage.append(f"ledger/{record_name('prepare', 0)} is missing")
    files = ledger.files()
    report.files += len(files)
    report.bytes += sum(size for size, _ in files.values())
    for what in changed(root, files):
        name = what.split(" ")[0]
        if not (spec and _interrupted_growth(root, ledger, spec, name)):
            report.damage.append(what)


def _interrupted_growth(root: Path, ledger: Ledger, spec: StoreSpec, name: str) -> bool:
    """Whether `name` is an array's metadata, right but ahead of the ledger by one segment."""
    array = name.removesuffix("/zarr.json")
    if array not in spec.arrays or not (root / "images" / str(len(ledger.prepares))).exists():
        return False
    try:
        text = (root / name).read_bytes()
        rows = json.loads(text)["shape"][0]
        return rows > ledger.rows and text == level_metadata(spec.arrays[array], rows, spec.shard_rows)
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return False


def _check_shards(root: Path, index: RowIndex, report: VerifyReport, progress: Progress) -> set[int]:
    """Compare shard files with their records; returns the shards that are damaged."""
    bad = set()
    committed = np.flatnonzero(index.committed).tolist()
    report.rows_ok += int((index.states == OK).sum())
    report.rows_failed += int((index.states == FAILED).sum())
    files = [(shard, array, index.file(array, shard)) for shard in committed for array in index.sizes]
    total, done = sum(file.size for *_, file in files), 0
    pool = ThreadPoolExecutor(THREADS)  # neither reading nor checksums hold the interpreter lock
    try:
        checks = pool.map(lambda task: _check_shard(root, *task), files)
        for (shard, array, file), (rows, damage) in zip(files, checks, strict=True):
            report.damage += damage
            report.damaged_rows += [(array, row, shard_path(array, shard)) for row in rows]
            bad |= {shard} if damage else set()
            done += file.size
            progress(done, total)
    finally:
        pool.shutdown(cancel_futures=True)
    report.shards, report.files, report.bytes = len(committed), report.files + len(files), report.bytes + total
    return bad


def _check_shard(root: Path, index: int, level: str, file: ShardFile) -> tuple[list[int], list[str]]:
    """The damaged rows, and a text for each thing that is damaged."""
    name = shard_path(level, index)
    if not (root / name).is_file():
        return [], [f"{name} is missing"]
    positions, rest_whole = compare(root / name, file.extents)
    rows = [index * len(file.extents) + position for position in positions]
    if rows:
        return rows, [f"row {row} of level {level} in {name} does not match its checksum" for row in rows]
    if not rest_whole or (root / name).stat().st_size != file.size:
        return [], [f"{name}: its rows are whole, but its index or what lies between them is not"]
    return [], []


def _check_orphans(root: Path, placed: list[Path], index: RowIndex, spec: StoreSpec, report: VerifyReport) -> set[int]:
    """Look at shard files without a record; returns the shards of damaged ones."""
    bad = set()
    for path in placed:
        name = _name(root, path)
        shard = int(name.split("/")[2])
        if _holds(index, shard):
            continue
        report.orphans.append(name)
        try:
            examine(path, spec.shard_rows)
        except ValueError as reason:
            bad.add(shard)
            report.damage.append(f"{name} was never committed and is damaged: {reason}")
    return bad


def _repair(root: Path, store: str, bad: set[int]) -> None:
    """Forget and remove damaged shards and records.

    Records first: a kill in between leaves files without a record, which the next repair removes.
    """
    with durable.locked(root / "ledger" / "lock"):
        index = outline(root, store)
        fill_index(root, index, store, lambda what: None)
        found = {*np.flatnonzero(index.committed).tolist()}
        index.committed[[shard for shard in bad if shard in found]] = False
        write_compaction(root, index, store)
        for path in (root / "ledger").glob("shard-*.json"):
            record = read_record(path, lambda what: None)
            if record is None or record["key"] in found | bad or path.name != record_name("shard", record["key"]):
                path.unlink()
        durable.fsync(root / "ledger")
        for shard in bad:
            for path in root.glob(shard_path("*", str(shard))):
                path.unlink()
                durable.fsync(path.parent)


def _name(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()
