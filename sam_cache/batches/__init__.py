"""Store rows or pixels, with masks and prompts, as streams of batches."""

from sam_cache.batches.annotations import Annotator, Sampling
from sam_cache.batches.cached import CachedBatches, read_rows
from sam_cache.batches.known_masks import KNOWN_BYTES
from sam_cache.batches.live import Example, LiveBatches, LiveImages, collate, usable_objects
from sam_cache.batches.object_columns import ViewCount, object_columns
from sam_cache.batches.order import Cursor, Order, Visit
from sam_cache.batches.pixels import PixelBatch, Preprocessing, pixel_batches
from sam_cache.batches.places import Places
from sam_cache.batches.split import is_held_out

__all__ = [
    "KNOWN_BYTES",
    "Annotator",
    "CachedBatches",
    "Cursor",
    "Example",
    "LiveBatches",
    "LiveImages",
    "Order",
    "PixelBatch",
    "Places",
    "Preprocessing",
    "Sampling",
    "ViewCount",
    "Visit",
    "collate",
    "is_held_out",
    "object_columns",
    "pixel_batches",
    "read_rows",
    "usable_objects",
]
