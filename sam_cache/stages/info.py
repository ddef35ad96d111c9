"""Describe a store: identity, rows, objects, bytes."""

import json
import re
from collections import Counter

import numpy as np

from sam_cache.config import InfoConfig
from sam_cache.store import ABSENT, FAILED, OK, EmbeddingStore, ImageTable


def info(cfg: InfoConfig) -> int:
    """Print what the store is and holds, as text or JSON; returns 0."""
    found = describe(EmbeddingStore.open(cfg.store))
    if cfg.as_json:
        print(json.dumps(found, indent=2))
        return 0
    for title, values in found.items():
        print(f"{title}:" if isinstance(values, dict) else f"{title}: {values}")
        for name, value in values.items() if isinstance(values, dict) else ():
            print(f"  {name}: {value}")
    return 0


def describe(store: EmbeddingStore) -> dict:
    states = store.row_states[store.images.rows]
    rows = len(store.images)
    objects = store.objects()
    return {
        "store": str(store.path),
        "identity": store.spec.to_json(),
        "recorded": store.recorded,
        "images": {
            "listed": rows,
            "embedded": int((states == OK).sum()),
            "failed": int((states == FAILED).sum()),
            "not yet": int((states == ABSENT).sum()),
        },
        **count_views(store.images),
        "shards": {"all": len(store.shards()), "committed": len(store.shards()) - len(store.uncommitted())},
        "objects": {
            "sets": store.object_sets(),
            "count": len(objects["id"]),
            "crowds": int(objects["iscrowd"].sum()),
            "categories": len(np.unique(objects["category"])),
            "centroids moved inside": int(objects["centroid_moved"].sum()),
            "box centers moved inside": int(objects["bbox_center_moved"].sum()),
        },
        "bytes": {
            name: {"on disk": size, "per row": store.spec.row_bytes[name]}
            for name, size in store.bytes_on_disk().items()
        },
        "skipped annotations": dict(enumerate(store.object_attributes().get("skipped", []), start=1)),
        "failures": {f"row {row}": message for row, message in store.failures()},
    }


def count_views(images: ImageTable) -> dict:
    """Rows of each kind of view: of `tile-0-1` and `tile-0-2` that is `tile`. Nothing for images alone."""
    kinds = Counter(re.sub(r"(?<=\w)[\W_]*\d.*", "", view) for view in images.views.tolist())
    if kinds.keys() <= {"identity"}:
        return {}
    return {"views": {"different images": len(np.unique(images.ids)), **kinds}}
