"""The store as the rest of the house sees it."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import zarr

from sam_cache import durable
from sam_cache.errors import StoreError
from sam_cache.store.columns import Table, read_attributes
from sam_cache.store.images import ImageTable
from sam_cache.store.ledger import NAMES, changed, damage, read_ledger, read_record, record_name, refusal
from sam_cache.store.prepare import MAIN, create, grow, replace_objects
from sam_cache.store.reader import RowReader
from sam_cache.store.row_index import ABSENT, RowIndex
from sam_cache.store.shard_records import (
    Compaction,
    fill_index,
    outline,
    read_compaction,
    signature_of_compaction,
    write_compaction,
)
from sam_cache.store.spec import FORMAT, Shard, StoreSpec
from sam_cache.store.stored_table import StoredTable
from sam_cache.store.writer import ShardBusy, ShardWriter, discard_partial, locked_journal
from sam_cache.types import ImageRecord

Prepare = Callable[[Sequence[ImageRecord]], Table]


class EmbeddingStore:
    """Embeddings of a list of images, with their objects and the weights to train from them.

    Made by `create_or_resume`, read by `open`. One row is one view of one image; rows stand in the
    order of the records, `shard_rows` to a shard.
    """

    def __init__(self, path: Path):
        """For `open`, which has a look at `path` first."""
        self.path = path
        self._ledger = read_ledger(path)
        if 0 not in self._ledger.prepares:
            raise damage(path, f"ledger/{record_name('prepare', 0)} is missing")
        self._check("zarr.json")
        metadata = json.loads((path / "zarr.json").read_bytes())["attributes"]["samcache"]
        self.spec = StoreSpec.from_json(metadata["identity"])
        self.recorded: dict = metadata["recorded"]
        self.images = self._list_images()
        self._shards = self._ledger.list_shards(self.spec.shard_rows)
        self._index = RowIndex(self.spec.arrays, len(self._shards), self.spec.shard_rows)
        for record in self._ledger.prepares.values():
            self._index.states[record["first_row"] : record["first_row"] + record["images"]] = ABSENT
        compaction, _ = fill_index(path, self._index, self._digest, refusal(path))
        self._compaction = compaction.signature

    @classmethod
    def open(cls, path: Path | str) -> "EmbeddingStore":
        """Open an existing store; DamageError if what opening reads is not what was committed.

        Raises StoreError when there is no store, when `path` is something else, or when a newer
        samcache wrote it.
        """
        path = Path(path)
        expect_store(path)
        return cls(path)

    @classmethod
    def create_or_resume(
        cls,
        path: Path | str,
        spec: StoreSpec,
        records: Sequence[ImageRecord],
        prepare: Prepare,
        base: bytes,
        recorded: dict,
        object_attributes: dict,
    ) -> "EmbeddingStore":
        """Open the store for `records`, making or growing it first where needed.

        `prepare(records)` computes the columns of object set `main` for images that the store
        does not know yet; its column `row` counts from 0 within those images. `base` is opaque,
        `recorded` is kept but never compared. A longer list than the store's appends shards; a
        prefix of it changes nothing. Raises StoreError when `path` is no store, or a store of
        another identity or other images; then nothing is touched.
        """
        path = Path(path)
        if not path.exists():
            durable.make_folders(path.parent)
            with durable.locked(path.with_name(f".{path.name}.lock")):
                if not path.exists():
                    create(path, spec, records, prepare(records), base, recorded, object_attributes)
                path.with_name(f".{path.name}.lock").unlink()
        store = cls._open_same(path, spec, records)
        if len(records) > len(store.images):
            with store._locked():
                store = cls._open_same(path, spec, records)  # another process may have grown it
                if new := records[len(store.images) :]:
                    grow(path, spec, store._ledger, new, prepare(new), object_attributes)
            store = cls._open_same(path, spec, records)
        return store

    @property
    def base(self) -> bytes:
        self._check("base/")
        return zarr.open_array(self.path / "base" / "weights", mode="r")[:].tobytes()

    def object_sets(self) -> list[str]:
        return self._ledger.object_sets()

    def objects(self, name: str = MAIN) -> Table:
        """The columns of an object set, read when they are asked for; `row` is the row of the object's image."""
        return StoredTable(self.path, self._parts(name), self._ledger.files())

    def object_attributes(self, name: str = MAIN) -> dict:
        last = self._parts(name)[-1]
        self._check(f"{last}/zarr.json")
        return read_attributes(self.path / last)

    def set_objects(self, name: str, table: Table, attributes: dict) -> None:
        """Add or replace object set `name` as a whole; `row` in `table` is a row of the store."""
        if not NAMES.fullmatch(record_name("objects", name)):
            raise StoreError(f"{self.path}: object set {name!r}: use letters, digits, - and _ only")
        with self._locked():
            self._ledger = read_ledger(self.path)
            replace_objects(self.path, self._ledger, name, table, attributes)
            self._ledger = read_ledger(self.path)

    @property
    def row_states(self) -> np.ndarray:
        """ABSENT, OK, FAILED or HOLE for every row, as uint8."""
        return self._index.states[: self._ledger.rows].copy()

    @property
    def content_hashes(self) -> np.ndarray:
        """Every row's image file as sha256 in hex (`S64`); empty where the row is not ok."""
        return self._index.content_hashes()[: self._ledger.rows]

    def failures(self) -> list[tuple[int, str]]:
        """(row, reason) of every failed row."""
        return sorted(self._index.failures.items())

    def bytes_on_disk(self) -> dict[str, int]:
        """Bytes of the committed shard files of each level, with those of its scale and offset."""
        sizes = self._index.sizes
        return {
            name: sum(int(sizes[array].sum()) for array in level.arrays(name))
            for name, level in self.spec.levels.items()
        }

    def shards(self) -> list[Shard]:
        return self._shards

    def committed(self, shard: Shard) -> bool:
        """Whether the ledger has the shard; what other processes have committed meanwhile counts."""
        if not self._index.committed[shard.index]:
            self._refresh(shard.index)
        return bool(self._index.committed[shard.index])

    def uncommitted(self) -> list[Shard]:
        return [shard for shard in self._shards if not self.committed(shard)]

    @contextmanager
    def writing(self, shard: Shard) -> Iterator[ShardWriter]:
        """Write one shard: it is committed when the block ends, and kept to go on when it raises.

        Raises ShardBusy when another process writes it or has committed it: go on with the next.
        """
        with locked_journal(self.path, shard.index) as journal:
            if self.committed(shard):
                discard_partial(self.path, self.spec, shard.index)
                raise ShardBusy(f"{self.path}: shard {shard.index} is committed already")
            writer = ShardWriter(self.path, self.spec, self._digest, shard, journal)
            try:
                yield writer
                self._index.add(writer.finish())
            finally:
                writer.close()

    def compact(self) -> None:
        """Gather all shard records, and sweep up after committed shards."""
        with self._locked():
            single = [*(self.path / "ledger").glob("shard-*.json")]
            index = outline(self.path, self._digest)
            fill_index(self.path, index, self._digest, refusal(self.path))
            write_compaction(self.path, index, self._digest)
            for path in single:
                path.unlink(missing_ok=True)
        self._index.add_table(index.to_table(), index.failures)
        for journal in (self.path / "ledger" / "partial").glob("shard-*.journal"):
            shard = int(journal.stem.removeprefix("shard-"))
            if shard < len(index.committed) and index.committed[shard]:
                with suppress(ShardBusy), locked_journal(self.path, shard):
                    discard_partial(self.path, self.spec, shard)

    def reader(self, levels: Sequence[str] = ("neck",), verify: bool = True) -> RowReader:
        """Reads rows of `levels`; without `verify` it trusts the disk, which only a measurement should."""
        return RowReader(self.path, self.spec, self._index, levels, verify)

    @property
    def _digest(self) -> str:
        """Ties shard records to this store: a record of another one is refused."""
        return self._ledger.prepares[0]["digest"]

    @classmethod
    def _open_same(cls, path: Path, spec: StoreSpec, records: Sequence[ImageRecord]) -> "EmbeddingStore":
        store = cls.open(path)
        differences = store.spec.differences(spec) + store.images.differences(records)
        if differences:
            raise StoreError(
                f"{path}: made for something else (store != now): {'; '.join(differences)}; "
                "choose another --store, or delete this one"
            )
        return store

    def _locked(self):
        return durable.locked(self.path / "ledger" / "lock")

    def _check(self, *prefixes: str) -> None:
        files = {name: entry for name, entry in self._ledger.files().items() if name.startswith(prefixes)}
        for what in changed(self.path, files):
            raise damage(self.path, what)

    def _list_images(self) -> ImageTable:
        segments = sorted(self._ledger.prepares.items())
        columns = StoredTable(self.path, [f"images/{segment}" for segment, _ in segments], self._ledger.files())
        return ImageTable(columns, sum(record["images"] for _, record in segments))

    def _parts(self, name: str) -> list[str]:
        if name not in self.object_sets():
            raise StoreError(f"{self.path}: it has no object set {name!r}, only {', '.join(self.object_sets())}")
        return self._ledger.parts(name)

    def _refresh(self, shard: int) -> None:
        """Take in what other processes have recorded since: this shard's record, or a compaction."""
        name = self.path / "ledger" / record_name("shard", shard)
        if record := read_record(name, refusal(self.path)):
            Compaction({shard: record}).fill(self._index, self._digest, refusal(self.path))
        elif signature_of_compaction(self.path) != self._compaction:
            compaction = read_compaction(self.path, refusal(self.path))
            self._compaction = compaction.signature
            compaction.fill(self._index, self._digest, refusal(self.path))


def expect_store(path: Path) -> None:
    """StoreError, with the remedy, when `path` is no store that this version can read."""
    if not path.exists():
        raise StoreError(f"{path}: there is no store here; make one with `samcache embed --store {path}`")
    metadata = {}
    with suppress(OSError, ValueError, KeyError, TypeError):
        metadata = json.loads((path / "zarr.json").read_bytes())["attributes"]["samcache"]
    if not metadata and not (path / "ledger" / record_name("prepare", 0)).exists():
        raise StoreError(f"{path}: this is not a samcache store; choose another --store")
    if metadata and metadata.get("format", 0) > FORMAT:
        raise StoreError(
            f"{path}: the store has format {metadata['format']}, this samcache reads up to {FORMAT}; upgrade samcache"
        )
