"""Tables as Zarr groups of flat arrays, one per column.

Text and bytes are a subgroup with `data` (uint8) and `offsets` (int64), because Zarr's string
type is not read everywhere.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TypeAlias

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from sam_cache.errors import StoreError

CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True, eq=False)
class Ragged:
    """A column of byte strings: item i is `data[offsets[i]:offsets[i + 1]]`."""

    data: np.ndarray
    offsets: np.ndarray

    @classmethod
    def from_list(cls, items: Sequence[bytes]) -> "Ragged":
        offsets = np.zeros(len(items) + 1, np.int64)
        np.cumsum([len(item) for item in items], out=offsets[1:])
        return cls(np.frombuffer(b"".join(items), np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, item: int) -> bytes:
        if not -len(self) <= item < len(self):
            raise IndexError(item)
        item %= len(self)
        return self.data[self.offsets[item] : self.offsets[item + 1]].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        return (self[item] for item in range(len(self)))


Table: TypeAlias = dict[str, np.ndarray | Ragged]


def write_table(folder: Path, table: Table, attributes: dict | None = None) -> None:
    """Create `folder` as a Zarr group that holds `table`, whose columns are of one length."""
    lengths = {name: len(column) for name, column in table.items()}
    if len(set(lengths.values())) > 1:
        raise StoreError(f"{folder}: columns of one table differ in length: {lengths}")
    group = zarr.create_group(folder, attributes=attributes or {})
    for name, column in table.items():
        if isinstance(column, Ragged):
            text = group.create_group(name)
            write_array(text, "data", column.data)
            write_array(text, "offsets", column.offsets)
        else:
            write_array(group, name, column)


def write_array(group: zarr.Group, name: str, values: np.ndarray) -> None:
    row_bytes = max(1, prod(values.shape[1:]) * values.itemsize)
    group.create_array(
        name,
        data=values,
        chunks=(max(1, min(len(values), CHUNK_BYTES // row_bytes)), *values.shape[1:]),
        compressors=[ZstdCodec(level=3), Crc32cCodec()],
        config={"write_empty_chunks": True},  # so that the ledger has a file, and a digest, for each
    )


def read_table(folder: Path) -> Table:
    return {
        name: node[:] if isinstance(node, zarr.Array) else Ragged(node["data"][:], node["offsets"][:])
        for name, node in sorted(zarr.open_group(folder, mode="r").members())
    }


def read_attributes(folder: Path) -> dict:
    return dict(zarr.open_group(folder, mode="r").attrs)


def concatenate(tables: Sequence[Table]) -> Table:
    """The tables under one another; those without any column (nothing was annotated) are left out."""
    tables = [table for table in tables if table]
    if len(tables) < 2:
        return tables[0] if tables else {}
    return {name: _join([table[name] for table in tables]) for name in tables[0]}


def _join(columns: list[np.ndarray | Ragged]) -> np.ndarray | Ragged:
    if not isinstance(columns[0], Ragged):
        return np.concatenate(columns)
    lengths = np.concatenate([np.diff(column.offsets) for column in columns])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Ragged(np.concatenate([column.data for column in columns]), offsets)
