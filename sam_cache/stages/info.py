"""Describe a store: identity, rows, objects, bytes."""

import json
from collections import Counter

import numpy as np

from sam_cache.config import InfoConfig
from sam_cache.stages.view_rows import ViewRows
from sam_cache.store import ABSENT, FAILED, OK, EmbeddingStore


def info(cfg: InfoConfig) -> int:
    """Print what the store is and holds, as text or JSON; returns 0."""
    found = describe(EmbeddingStore.open(cfg.store))
    if cfg.as_json:
        print(json.dumps(found, indent=2))
        return 0
    for title, values in (found | {"bytes": tell_bytes(found["bytes"])}).items():
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
        **count_views(store),
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


def count_views(store: EmbeddingStore) -> dict:
    """Rows of each kind of view: of `tile/0` and `tile/1` that is `tile`. Nothing for images alone."""
    kinds = Counter(ViewRows.of(store).kinds.tolist())
    if kinds.keys() <= {"identity"}:
        return {}
    return {"views": {"different images": len(np.unique(store.images.ids)), **kinds}}


def tell_bytes(levels: dict[str, dict[str, int]]) -> dict[str, str]:
    """The bytes of each level and of all together, in words."""
    total = {key: sum(sizes[key] for sizes in levels.values()) for key in ("on disk", "per row")}
    return {
        name: f"{in_units(sizes['on disk'])} on disk, {in_units(sizes['per row'])} a row"
        for name, sizes in (levels | {"all levels": total}).items()
    }


def in_units(count: int) -> str:
    """So many bytes in two or three figures, such as 49 KiB and 4.0 KiB."""
    if count < 1000:
        return f"{count} bytes"
    size, units = count / 1024, ["KiB", "MiB", "GiB", "TiB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.{0 if size >= 10 else 1}f} {units[0]}"
