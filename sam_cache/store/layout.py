"""Where bytes stand: Zarr v3 metadata and the inside of a shard file. Nothing here does I/O.

A shard file, as `sharding_indexed` with its index at the end describes it:

    row  crc32c  gap | row  crc32c  gap | ...  | index  crc32c
    ^ 4 KiB boundary   ^ 4 KiB boundary

Rows stand in the order in which they were written. The index holds an (offset, length) pair of
little-endian uint64 for every row of the shard, in row order, all ones where a row is absent.
Gaps let rows start on pages, so that O_DIRECT stays possible; every Zarr reader skips them.
Source: https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/index.html
"""

import json
from typing import NamedTuple

import google_crc32c
import numpy as np

from sam_cache.store.codecs import codec_metadata
from sam_cache.store.spec import LevelSpec

PAGE = 4096
CHECKSUM_BYTES = 4
ABSENT_ENTRY = 0xFFFF_FFFF_FFFF_FFFF


class Extent(NamedTuple):
    """Where one stored row lies in its shard file; `length` counts the crc32c after the row."""

    offset: int
    length: int
    checksum: int

    @property
    def end(self) -> int:
        """Where the next row may start."""
        return -(-(self.offset + self.length) // PAGE) * PAGE


def shard_path(array: str, index: int) -> str:
    return f"{array}/c/{index}/0/0/0"


def index_size(shard_rows: int) -> int:
    return 16 * shard_rows + CHECKSUM_BYTES


def raw_file_size(level: LevelSpec, rows: int, shard_rows: int) -> int | None:
    """Bytes of a shard file with `rows` rows; None where compression decides."""
    if level.codec != "raw":
        return None
    return rows * Extent(0, level.nbytes + CHECKSUM_BYTES, 0).end + index_size(shard_rows)


def encode_index(extents: list[Extent | None]) -> bytes:
    entries = [(e.offset, e.length) if e else (ABSENT_ENTRY, ABSENT_ENTRY) for e in extents]
    data = np.array(entries, "<u8").tobytes()
    return data + google_crc32c.value(data).to_bytes(CHECKSUM_BYTES, "little")


def decode_index(data: bytes) -> list[tuple[int, int] | None]:
    """(offset, length) per row of the shard, None where absent; ValueError if the index is damaged."""
    body, checksum = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
    if google_crc32c.value(body) != int.from_bytes(checksum, "little"):
        raise ValueError("the shard index does not match its checksum")
    entries = np.frombuffer(body, "<u8").reshape(-1, 2).tolist()
    return [None if entry[0] == ABSENT_ENTRY else tuple(entry) for entry in entries]


def group_metadata(attributes: dict) -> bytes:
    return _text({"zarr_format": 3, "node_type": "group", "attributes": attributes})


def level_metadata(level: LevelSpec, rows: int, shard_rows: int) -> bytes:
    """`zarr.json` of an array of shape (rows, C, H, W): a pure function, so it can be checked."""
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    plain = little if level.stored.itemsize > 1 else {"name": "bytes"}
    kept = {} if level.keep_bits is None else {"keep_bits": level.keep_bits}
    sharding = {
        "chunk_shape": [1, *level.shape],
        "codecs": [plain, *codec_metadata(level), {"name": "crc32c"}],
        "index_codecs": [little, {"name": "crc32c"}],
        "index_location": "end",
    }
    return _array(
        shape=[rows, *level.shape],
        data_type=level.stored.zarr_name,
        chunk_shape=[shard_rows, *level.shape],
        fill_value=level.stored.fill_value,
        codecs=[{"name": "sharding_indexed", "configuration": sharding}],
        attributes={"samcache": {"dtype": level.dtype} | kept},
        dimension_names=["row", "channel", "y", "x"],
    )


def ledger_metadata() -> bytes:
    """The ledger's folder is an empty array: readers that walk a store do not look inside one.

    As a group it would make zarr-python warn about every record in it.
    """
    return _array(
        shape=[0],
        data_type="uint8",
        chunk_shape=[1],
        fill_value=0,
        codecs=[{"name": "bytes"}],
        attributes={"samcache": "records that say what is committed, as JSON files"},
    )


def _array(shape: list[int], chunk_shape: list[int], **metadata) -> bytes:
    return _text(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": shape,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk_shape}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            **metadata,
        }
    )


def _text(metadata: dict) -> bytes:
    return json.dumps(metadata, indent=2).encode()
