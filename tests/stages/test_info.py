"""What `samcache info` says of stores that have more than one array per level, or row per image."""

import json
from dataclasses import replace

import numpy as np
import pytest

from sam_cache.store import EmbeddingStore, LevelSpec, StoreSpec
from sam_cache.types import ImageRecord

LEVELS = {"neck": LevelSpec(2, 4, 4, "fp16"), "early": LevelSpec(3, 4, 4, "int8")}
KINDS = ["identity", "mirror", "tile-0-1", "tile-0-2", "tile_1_1"]


def make(path, kinds: list[str]) -> EmbeddingStore:
    """Two images in every view of `kinds`, written whole."""
    images = [ImageRecord(id, f"{id}.png", 4, 4) for id in (7, 9)]
    records = [replace(image, view=kind) for image in images for kind in kinds]
    spec = StoreSpec("tiny", "ab", LEVELS, "fp32", {}, shard_rows=4, views=",".join(kinds))

    def prepare(records):
        return {
            "row": np.zeros(0, np.int64),
            "id": np.zeros(0, np.int64),
            "category": np.zeros(0, np.int64),
            "iscrowd": np.zeros(0, bool),
            "centroid_moved": np.zeros(0, bool),
            "bbox_center_moved": np.zeros(0, bool),
        }

    store = EmbeddingStore.create_or_resume(path, spec, records, prepare, b"", {}, {})
    for shard in store.shards():
        with store.writing(shard) as writer:
            for row in shard.rows:
                writer.append(row, {name: np.ones(level.shape, np.float32) for name, level in LEVELS.items()}, "")
    return store


@pytest.fixture
def told(samcache, tmp_path, capsys):
    def tell(kinds: list[str]) -> dict:
        make(tmp_path / "s", kinds)
        assert samcache("info", "--store", "s", "--json") == 0
        return json.loads(capsys.readouterr().out)

    return tell


def test_bytes_of_a_level_include_its_scale_and_offset(told, tmp_path):
    """Each row of the int8 level is three: one of bytes, two of a number per channel."""
    found = told(["identity"])["bytes"]
    assert {name: entry["per row"] for name, entry in found.items()} == {"neck": 2 * 16 * 2, "early": 3 * 16 + 2 * 12}
    files = {name: sum(p.stat().st_size for p in tmp_path.glob(f"s/{name}/c/*/0/0/0")) for name in ("neck", "early")}
    companions = sum(p.stat().st_size for p in tmp_path.glob("s/early_*/c/*/0/0/0"))
    assert companions > 0
    assert found["neck"]["on disk"] == files["neck"]
    assert found["early"]["on disk"] == files["early"] + companions


def test_views_are_counted_by_kind(told):
    found = told(KINDS)
    assert found["identity"]["views"] == ",".join(KINDS)
    assert found["views"] == {"different images": 2, "identity": 2, "mirror": 2, "tile": 6}
    assert found["images"]["embedded"] == 10


def test_a_store_of_images_alone_says_nothing_of_views(told):
    assert "views" not in told(["identity"])
