"""The prepare step: everything but the embeddings, made aside and moved into place whole."""

import os
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import zarr

from sam_cache import durable
from sam_cache.store import layout
from sam_cache.store.columns import Ragged, Table, write_array, write_table
from sam_cache.store.ledger import Ledger, digests, read_ledger, record_name, seal
from sam_cache.store.spec import FORMAT, StoreSpec
from sam_cache.types import ImageRecord

MAIN = "main"


def create(
    path: Path,
    spec: StoreSpec,
    records: Sequence[ImageRecord],
    objects: Table,
    base: bytes,
    recorded: dict,
    object_attributes: dict,
) -> None:
    """Make a prepared store at `path`: in a sibling folder first, so that it is whole or absent.

    Whoever comes second, by a lock that does not reach this process, leaves the first one's.
    """
    for leftover in path.parent.iterdir():
        if leftover.name.startswith(f".{path.name}.prepare-"):
            durable.remove_folder(leftover)
    draft = path.with_name(f".{path.name}.prepare-{uuid.uuid4().hex}")
    identity = {"format": FORMAT, "identity": spec.to_json(), "recorded": recorded}
    _write(draft / "zarr.json", layout.group_metadata({"samcache": identity}))
    for group in ("images", "objects"):
        _write(draft / group / "zarr.json", layout.group_metadata({}))
    write_array(zarr.create_group(draft / "base"), "weights", np.frombuffer(base, np.uint8))
    _write(draft / "ledger" / "zarr.json", layout.ledger_metadata())
    record = _write_segment(draft, spec, 0, 0, records, objects, object_attributes)
    _write(draft / "ledger" / record_name("prepare", 0), seal(record))
    durable.fsync_tree(draft)
    try:
        durable.rename(draft, path)
    except OSError:
        durable.remove_folder(draft)
        if not path.is_dir():
            raise


def grow(
    root: Path,
    spec: StoreSpec,
    ledger: Ledger,
    records: Sequence[ImageRecord],
    objects: Table,
    object_attributes: dict,
) -> None:
    """Append a segment that holds `records`; the caller holds the store's lock.

    It counts from the moment its record is linked. What an interrupted attempt left is removed.
    """
    remove_leftovers(root, ledger)
    segment = len(ledger.prepares)
    draft = root / "ledger" / "draft"
    first_row = -(-ledger.rows // spec.shard_rows) * spec.shard_rows
    record = _write_segment(draft, spec, segment, first_row, records, objects, object_attributes)
    durable.fsync_tree(draft)
    durable.rename(draft / f"images/{segment}", root / f"images/{segment}")
    _move_part(draft, root, MAIN, record["objects"][MAIN])
    for array in spec.arrays:
        durable.replace(root / array / "zarr.json", (draft / array / "zarr.json").read_bytes())
    durable.place(root / "ledger" / record_name("prepare", segment), seal(record))
    durable.remove_folder(draft)


def replace_objects(root: Path, ledger: Ledger, name: str, objects: Table, attributes: dict) -> None:
    """Add or replace a whole object set; the caller holds the store's lock."""
    remove_leftovers(root, ledger)
    draft = root / "ledger" / "draft"
    part = uuid.uuid4().hex
    _write_part(draft, name, part, objects, attributes)
    durable.fsync_tree(draft)
    record = {
        "key": name,
        "part": part,
        "segments": len(ledger.prepares),
        "files": digests(draft),
    }
    _move_part(draft, root, name, part)
    durable.replace(root / "ledger" / record_name("objects", name), seal(record))
    remove_leftovers(root, read_ledger(root))


def leftovers(root: Path, ledger: Ledger) -> list[str]:
    """Folders of interrupted attempts, or superseded ones: no record speaks of them."""
    known = {f"images/{segment}" for segment in ledger.prepares}
    known |= {part for name in ledger.object_sets() for part in ledger.parts(name)}
    found = [root / "ledger" / "draft", *root.glob("images/*/"), *root.glob("objects/*/*/")]
    names = [path.relative_to(root).as_posix() for path in found if path.is_dir()]
    return sorted(name for name in names if name not in known)


def remove_leftovers(root: Path, ledger: Ledger) -> None:
    for name in leftovers(root, ledger):
        durable.remove_folder(root / name)


def image_columns(records: Sequence[ImageRecord], first_row: int) -> Table:
    """One table row per record: a view of an image, with view xy = view_transform @ (image xy, 1)."""
    transforms = np.array([record.transform for record in records], np.float64)
    return {
        "id": np.array([record.id for record in records], np.int64),
        "path": Ragged.from_list([record.path.encode() for record in records]),
        "height": np.array([record.height for record in records], np.int32),
        "width": np.array([record.width for record in records], np.int32),
        "split": Ragged.from_list([record.split.encode() for record in records]),
        "row": np.arange(first_row, first_row + len(records), dtype=np.int64),
        "view": Ragged.from_list([record.view.encode() for record in records]),
        "view_transform": transforms.reshape(len(records), 2, 3),
    }


def _write_segment(
    root: Path,
    spec: StoreSpec,
    segment: int,
    first_row: int,
    records: Sequence[ImageRecord],
    objects: Table,
    attributes: dict,
) -> dict:
    """Write the segment's files below `root`; returns its record."""
    rows = first_row + len(records)
    write_table(root / "images" / str(segment), image_columns(records, first_row))
    if "row" in objects:
        objects = {**objects, "row": objects["row"] + first_row}
    part = str(segment)
    _write_part(root, MAIN, part, objects, attributes)
    for name, array in spec.arrays.items():
        _write(root / name / "zarr.json", layout.level_metadata(array, rows, spec.shard_rows))
    return {
        "key": segment,
        "first_row": first_row,
        "images": len(records),
        "rows": rows,
        "objects": {MAIN: part},
        "files": digests(root),
    }


def _write_part(root: Path, name: str, part: str, objects: Table, attributes: dict) -> None:
    _write(root / "objects" / name / "zarr.json", layout.group_metadata({}))
    write_table(root / "objects" / name / part, objects, attributes)


def _move_part(draft: Path, root: Path, name: str, part: str) -> None:
    durable.make_folders(root / "objects" / name)
    with suppress(FileExistsError):
        os.link(draft / "objects" / name / "zarr.json", root / "objects" / name / "zarr.json")
    durable.rename(draft / "objects" / name / part, root / "objects" / name / part)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
