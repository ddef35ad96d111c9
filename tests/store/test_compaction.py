"""A compacted store opens to the same as the single records it was gathered from."""

import json
import os
import shutil

import numpy as np
import pytest
import torch

from sam_cache.errors import DamageError
from sam_cache.store import OK, EmbeddingStore, verify
from sam_cache.store.ledger import seal
from sam_cache.store.row_index import RowIndex


@pytest.fixture(scope="module")
def single(tmp_path_factory, kit):
    """Two segments, an int8 level beside a float one, failed rows, and one shard that is not written."""
    path = tmp_path_factory.mktemp("compaction") / "s"
    spec = kit.spec(early_dtype="int8")
    kit.fill(kit.open(path, spec, 6), failing=[1, 4])
    kit.fill(kit.open(path, spec, 11), failing=[9])
    store = kit.open(path, spec, 13)
    assert [shard.index for shard in store.uncommitted()] == [4]
    return store


@pytest.fixture
def copy(single, tmp_path):
    return shutil.copytree(single.path, tmp_path / "s")


def assert_same(one: RowIndex, other: RowIndex) -> None:
    ours, theirs = dict(one._columns()), dict(other._columns())
    assert ours.keys() == theirs.keys()
    for name, column in ours.items():
        np.testing.assert_array_equal(column, theirs[name], err_msg=name)
    np.testing.assert_array_equal(one.committed, other.committed)
    assert one.failures == other.failures


def columns_of(path) -> list[str]:
    return sorted(name for name in os.listdir(path / "ledger") if name.endswith(".npy"))


def test_compacted_and_single_records_open_to_the_same(single, copy, kit):
    EmbeddingStore.open(copy).compact()
    assert not [*(copy / "ledger").glob("shard-*.json")]
    opened = EmbeddingStore.open(copy)
    assert_same(opened._index, single._index)
    assert (
        opened.failures() == single.failures() == [(1, "truncated JPEG"), (4, "truncated JPEG"), (9, "truncated JPEG")]
    )
    assert opened.content_hashes.tolist() == single.content_hashes.tolist()
    assert opened.content_hashes[0].decode() == kit.content(0)
    assert opened.bytes_on_disk() == single.bytes_on_disk()
    rows = np.flatnonzero(opened.row_states == OK)
    ours, theirs = (store.reader(("neck", "early")) for store in (opened, single))
    one, other = ours.empty(len(rows)), theirs.empty(len(rows))
    ours.read(rows, one)
    theirs.read(rows, other)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_shards_that_come_later_are_gathered_with_the_others(copy, kit):
    EmbeddingStore.open(copy).compact()
    (before,) = columns_of(copy)
    grown = kit.fill(EmbeddingStore.open(copy))
    assert [path.name for path in (copy / "ledger").glob("shard-*.json")] == ["shard-000004.json"]
    grown.compact()
    (after,) = columns_of(copy)
    assert before != after
    assert_same(EmbeddingStore.open(copy)._index, grown._index)
    assert verify(copy).ok
    assert verify(copy).uncommitted == []


def test_a_store_that_an_earlier_version_compacted_opens_and_is_compacted_anew(single, copy):
    records = [json.loads(path.read_bytes()) for path in sorted((copy / "ledger").glob("shard-*.json"))]
    for path in (copy / "ledger").glob("shard-*.json"):
        path.unlink()
    (copy / "ledger/compact.json").write_bytes(seal({"shards": records}))
    store = EmbeddingStore.open(copy)
    assert_same(store._index, single._index)
    assert verify(copy).ok
    store.compact()
    assert "shards" not in json.loads((copy / "ledger/compact.json").read_bytes())
    assert_same(EmbeddingStore.open(copy)._index, single._index)
    assert verify(copy).ok


def test_a_store_without_any_shard_is_compacted(tmp_path, kit):
    store = kit.open(tmp_path / "s", kit.spec(), 5)
    store.compact()
    assert len(EmbeddingStore.open(store.path).uncommitted()) == 2
    kit.fill(store).compact()
    assert verify(store).ok
    assert not EmbeddingStore.open(store.path).uncommitted()


def test_damaged_columns_stop_an_open_and_are_made_again_after_a_repair(single, copy, kit):
    EmbeddingStore.open(copy).compact()
    (name,) = columns_of(copy)
    columns = copy / "ledger" / name
    data = bytearray(columns.read_bytes())
    data[-7] ^= 1
    columns.write_bytes(data)
    with pytest.raises(DamageError, match=f"ledger/{name} is not what was committed"):
        EmbeddingStore.open(copy)
    assert verify(copy).damage == [f"ledger/{name} is not what was committed"]
    columns.unlink()
    with pytest.raises(DamageError, match=f"ledger/{name} is missing"):
        EmbeddingStore.open(copy)
    verify(copy, repair=True)
    assert verify(copy).ok
    kit.fill(EmbeddingStore.open(copy), failing=[1, 4, 9])  # the files are there, and are taken in again
    assert verify(copy).ok
    assert (EmbeddingStore.open(copy).row_states == OK).sum() == 10


def test_columns_of_another_store_are_refused(copy, tmp_path, kit):
    other = kit.open(tmp_path / "other", kit.spec(encoder="vit_b", early_dtype="int8"), 6)
    kit.fill(other).compact()
    for path in (copy / "ledger").glob("shard-*.json"):
        path.unlink()
    for path in (other.path / "ledger").glob("compact*"):
        shutil.copy(path, copy / "ledger")
    with pytest.raises(DamageError, match=r"ledger/compact.json is of another store"):
        EmbeddingStore.open(copy)
    assert verify(copy).damage == ["ledger/compact.json is of another store"]
    verify(copy, repair=True)
    assert verify(copy).ok


def test_columns_that_another_process_replaces_meanwhile_are_read_from_the_new_file(copy, monkeypatch):
    """Between the look at compact.json and the look at its columns, another process compacts."""
    EmbeddingStore.open(copy).compact()
    module = __import__("sam_cache.store.shard_records", fromlist=["read_record"])
    read_record, other = module.read_record, EmbeddingStore.open(copy)
    calls = []

    def read_and_compact(path, report):
        record = read_record(path, report)
        calls.append(path.name)
        if calls == ["compact.json"]:
            other.compact()
        return record

    monkeypatch.setattr(module, "read_record", read_and_compact)
    assert len(EmbeddingStore.open(copy).uncommitted()) == 1
    assert calls.count("compact.json") >= 2


def test_image_columns_are_checked_when_they_are_first_asked_for(copy):
    shutil.rmtree(copy / "images/1/path")
    images = EmbeddingStore.open(copy).images
    assert images.ids.tolist() == list(range(100, 113))
    assert len(images) == 13
    with pytest.raises(DamageError, match="images/1/path/.* is missing"):
        images.paths  # noqa: B018
