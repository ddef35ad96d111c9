"""The embedding store: sharded, checksummed, crash-safe Zarr v3.

zarr.json                     identity, as attributes of the group
neck/  early/ ...             one array per level, (rows, C, H, W), a chunk per row; beside one of int8
                              early_scale/ and early_offset/, (rows, C, 1, 1): value = int8 * scale + offset
images/0/  images/1/ ...      columns, per segment: the first list of views of images, and what was added
objects/main/0/ ...           columns of an object set, likewise
base/weights                  the weights that training starts from, as opaque bytes
ledger/                       what is committed; see `sam_cache.store.ledger`
"""

from sam_cache.store.columns import Ragged, Table
from sam_cache.store.embedding_store import EmbeddingStore
from sam_cache.store.images import ImageTable
from sam_cache.store.reader import RowReader
from sam_cache.store.ring import Ring
from sam_cache.store.row_index import ABSENT, FAILED, HOLE, OK
from sam_cache.store.spec import FORMAT, STORED_TYPES, LevelSpec, Shard, StoreSpec
from sam_cache.store.verify import VerifyReport, verify
from sam_cache.store.writer import ShardBusy, ShardWriter

__all__ = [
    "ABSENT",
    "EmbeddingStore",
    "FAILED",
    "FORMAT",
    "HOLE",
    "ImageTable",
    "LevelSpec",
    "OK",
    "Ragged",
    "Ring",
    "RowReader",
    "STORED_TYPES",
    "Shard",
    "ShardBusy",
    "ShardWriter",
    "StoreSpec",
    "Table",
    "VerifyReport",
    "verify",
]
