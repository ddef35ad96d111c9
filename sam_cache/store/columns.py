"""Tables as Zarr groups of flat arrays, one per column.

Text and bytes are a subgroup with `data` (uint8) and `offsets` (int64), because Zarr's string
type is not read everywhere.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TypeAlias

import numpy as np
import zarr
from numcodecs import zstd
from zarr.codecs import Crc32cCodec, ZstdCodec

from sam_cache.errors import StoreError
from sam_cache.store.layout import CHECKSUM_BYTES

CHUNK_BYTES = 16 * 2**20
TEXTS_AT_ONCE = 2**16


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

    def to_text(self) -> np.ndarray:
        """The items, in UTF-8 and without a zero byte, as numpy's variable-width strings."""
        texts = np.empty(len(self), np.dtypes.StringDType())
        # numpy turns strings of one width into its own at once, where a `str` for each takes ten times as long.
        for first in range(0, len(self), TEXTS_AT_ONCE):
            offsets = self.offsets[first : first + TEXTS_AT_ONCE + 1]
            lengths = np.diff(offsets)
            padded = np.zeros((len(lengths), max(1, lengths.max())), np.uint8)
            padded[np.arange(padded.shape[1]) < lengths[:, None]] = self.data[offsets[0] : offsets[-1]]
            texts[first : first + len(lengths)] = padded.view(f"S{padded.shape[1]}")[:, 0]
        return texts


Table: TypeAlias = Mapping[str, np.ndarray | Ragged]


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


def read_column(folder: Path) -> np.ndarray | Ragged:
    """A column whose files were just found to be what was committed: their checksums are not looked at."""
    node = zarr.open(folder, mode="r")
    if isinstance(node, zarr.Array):
        return _read_array(node, folder)
    return Ragged(_read_array(node["data"], folder / "data"), _read_array(node["offsets"], folder / "offsets"))


def _read_array(node: zarr.Array, folder: Path) -> np.ndarray:
    """Each chunk is decompressed where it is to stand: zarr puts it into fresh memory first, which costs more."""
    plain = [type(codec) for codec in node.compressors] == [ZstdCodec, Crc32cCodec] and node.chunks[0]
    if not plain or node.shards or node.filters or node.chunks[1:] != node.shape[1:]:
        return node[:]  # as `write_array` never writes it
    found = np.empty(node.shape, node.dtype)
    whole, size = found.reshape(-1).view(np.uint8), prod(node.chunks) * found.itemsize

    def read(number: int) -> None:
        path = folder / "c" / "/".join([str(number), *"0" * (node.ndim - 1)])
        data, target = memoryview(path.read_bytes())[:-CHECKSUM_BYTES], whole[number * size :][:size]
        if len(target) == size:
            zstd.decompress(data, target)
        else:  # the last chunk is filled up
            target[:] = np.frombuffer(zstd.decompress(data), np.uint8)[: len(target)]

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(read, range(-(-len(whole) // size) if size else 0)))
    return found


def read_attributes(folder: Path) -> dict:
    return dict(zarr.open_group(folder, mode="r").attrs)


def join(columns: Sequence[np.ndarray | Ragged]) -> np.ndarray | Ragged:
    """The columns under one another; one alone is not copied."""
    if len(columns) == 1:
        return columns[0]
    if not isinstance(columns[0], Ragged):
        return np.concatenate(columns)
    lengths = np.concatenate([np.diff(column.offsets) for column in columns])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Ragged(np.concatenate([column.data for column in columns]), offsets)
