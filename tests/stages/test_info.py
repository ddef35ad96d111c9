"""What `samcache info` says of stores that have more than one array per level, or row per image."""

import json
from dataclasses import replace

import numpy as np
import pytest

from sam_cache.stages.info import in_units
from sam_cache.store import EmbeddingStore, LevelSpec, StoreSpec
from sam_cache.types import ImageRecord

LEVELS = {"neck": LevelSpec(2, 4, 4, "fp16"), "early": LevelSpec(3, 4, 4, "int8")}
KINDS = ["identity", "hflip", "lsj/0", "lsj/1", "tile/0", "tile/1", "tile/10"]
VIEWS = "identity,hflip,lsj:2,tile:4:0"


def make(path, kinds: list[str], views: str) -> EmbeddingStore:
    """Two images in every view of `kinds`, written whole."""
    images = [ImageRecord(id, f"{id}.png", 4, 4) for id in (7, 9)]
    records = [replace(image, view=kind) for image in images for kind in kinds]
    spec = StoreSpec("tiny", "ab", LEVELS, "fp32", {}, shard_rows=4, views=views)

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
    def tell(kinds: list[str], views: str = "identity") -> dict:
        make(tmp_path / "s", kinds, views)
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
    found = told(KINDS, VIEWS)
    assert found["identity"]["views"] == VIEWS
    assert found["views"] == {"different images": 2, "identity": 2, "hflip": 2, "lsj": 4, "tile": 6}
    assert found["images"]["embedded"] == 14


def test_a_store_of_images_alone_says_nothing_of_views(told):
    assert "views" not in told(["identity"])


def test_people_read_bytes_in_units_and_their_sum(told, samcache, tmp_path, capsys):
    sizes = told(["identity"])["bytes"]
    assert samcache("info", "--store", "s") == 0
    said = capsys.readouterr().out.splitlines()
    lines = said[said.index("bytes:") + 1 :][:3]
    total = sum(entry["on disk"] for entry in sizes.values())
    assert lines == [
        f"  neck: {in_units(sizes['neck']['on disk'])} on disk, 64 bytes a row",
        f"  early: {in_units(sizes['early']['on disk'])} on disk, 72 bytes a row",
        f"  all levels: {in_units(total)} on disk, 136 bytes a row",
    ]


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (4096, "4.0 KiB"),
        (50180, "49 KiB"),
        (1010 * 1024, "1.0 MiB"),
        (10 * 2**20, "10 MiB"),
        (433 * 2**30, "433 GiB"),
        (5000 * 2**40, "5000 TiB"),
    ],
)
def test_units_are_binary(count, words):
    assert in_units(count) == words
