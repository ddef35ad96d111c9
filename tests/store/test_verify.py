"""Verify finds all damage, calls nothing else damage, and repairs shards only."""

import json
import os
import shutil
import sys
import time

import numpy as np
import pytest
import torch

from sam_cache import durable
from sam_cache.errors import DamageError
from sam_cache.store import OK, EmbeddingStore, verify
from sam_cache.store.layout import shard_path
from sam_cache.store.ledger import seal, unseal


@pytest.fixture(scope="module")
def whole(tmp_path_factory, kit):
    """Two segments, two levels, a failed row, a second object set; half compacted."""
    path = tmp_path_factory.mktemp("verify") / "s"
    kit.fill(kit.open(path, kit.spec(two_levels=True), 6), failing=[1]).compact()
    store = kit.fill(kit.open(path, kit.spec(two_levels=True), 7))
    store.set_objects("extra", {"row": np.array([0])}, {})
    return EmbeddingStore.open(path)


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole.path, tmp_path / "s")


def flip(path, position: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def test_a_whole_store_is_ok_and_counted(whole):
    seen = []
    report = verify(whole.path, lambda done, total: seen.append((done, total)))
    assert report.ok
    assert (report.rows_ok, report.rows_failed, report.shards) == (6, 1, 3)
    shard_bytes = sum(whole.bytes_on_disk().values())
    assert seen[-1] == (shard_bytes, shard_bytes)
    files = [p for p in whole.path.rglob("*") if p.is_file() and (p.parent.name != "ledger" or p.name == "zarr.json")]
    assert report.files == len(files)
    assert report.bytes == sum(path.stat().st_size for path in files)
    assert (report.uncommitted, report.orphans, report.leftovers) == ([], [], [])
    assert json.loads(json.dumps(report.to_json()))["ok"] is True
    assert verify(whole).to_json() == report.to_json()


def test_stopping_does_not_wait_for_the_files_to_come(whole, monkeypatch):
    module, checked = sys.modules[verify.__module__], []

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    check = module._check_shard
    monkeypatch.setattr(module, "THREADS", 1)
    monkeypatch.setattr(module, "_check_shard", lambda *task: (checked.append(task), time.sleep(0.05), check(*task))[2])
    with pytest.raises(KeyboardInterrupt):
        verify(whole, stop)
    assert len(checked) < 6


def test_one_flipped_bit_in_any_file_is_found(copy):
    """Every file of the store, at two places."""
    draw = np.random.default_rng(0)
    for path in sorted(path for path in copy.rglob("*") if path.is_file() and path.name != "lock"):
        data = path.read_bytes()
        for position in (int(draw.integers(0, len(data))), len(data) - 1):
            flip(path, position, int(draw.integers(0, 8)))
            report = verify(copy)
            assert report.damage, f"{path} at {position}"
            assert any(path.relative_to(copy).as_posix() in what for what in report.damage)
            path.write_bytes(data)
    assert verify(copy).ok


def test_any_flipped_bit_of_a_record_is_found(whole):
    for path in (whole.path / "ledger").glob("*-*.json"):
        data = path.read_bytes()
        assert seal({k: v for k, v in unseal(data).items() if k != "digest"}) == data
        for position in range(len(data)):
            flipped = bytearray(data)
            flipped[position] ^= 1 << position % 8
            with pytest.raises((ValueError, AttributeError)):
                unseal(bytes(flipped))


def test_flips_in_a_shard_name_the_row(copy):
    draw = np.random.default_rng(1)
    path = copy / shard_path("early", 0)
    data = path.read_bytes()
    stride = 4096  # rows 0, 2, 3: row 1 has failed
    for place, row in enumerate([0, 2, 3]):
        for position in draw.integers(place * stride, place * stride + 6 * 8 * 8 * 2 + 4, 8).tolist():
            flip(path, position, int(draw.integers(0, 8)))
            report = verify(copy)
            assert report.damaged_rows == [("early", row, "early/c/0/0/0/0")]
            assert report.damage == [f"row {row} of level early in early/c/0/0/0/0 does not match its checksum"]
            path.write_bytes(data)
    for position in [3000, *range(len(data) - 68, len(data), 5)]:  # the gap, the index
        flip(path, position, 7)
        assert verify(copy).damage == [
            "early/c/0/0/0/0: its rows are whole, but its index or what lies between them is not"
        ]
        path.write_bytes(data)


@pytest.mark.parametrize("size", [0, 1, 68, 4000, 4096, 9000, -1, "longer"])
def test_a_file_of_another_length_is_found(copy, size):
    path = copy / shard_path("neck", 0)
    length = path.stat().st_size
    os.truncate(path, {"longer": length + 1, -1: length - 1}.get(size, size))
    assert verify(copy).damage


def test_missing_and_swapped_files_are_found(copy):
    (copy / shard_path("neck", 0)).unlink()
    (copy / "objects/main/0/row/c/0").unlink()
    one, other = copy / shard_path("early", 0), copy / shard_path("early", 1)
    shutil.copy(other, one)
    report = verify(copy)
    assert {"neck/c/0/0/0/0 is missing", "objects/main/0/row/c/0 is missing"} <= {*report.damage}
    assert {(level, row) for level, row, _ in report.damaged_rows} >= {("early", 0), ("early", 2), ("early", 3)}
    with pytest.raises(DamageError, match="objects/main/0/row/c/0 is missing"):
        EmbeddingStore.open(copy).objects()["row"]


def test_missing_foreign_and_misplaced_records(copy, tmp_path, kit):
    ledger = copy / "ledger"
    # A record is lost: the shard is waiting for the next embed, and its files are no damage.
    record = (ledger / "shard-000002.json").read_bytes()
    (ledger / "shard-000002.json").unlink()
    report = verify(copy)
    assert (report.damage, report.uncommitted) == ([], [2])
    assert report.orphans == ["early/c/2/0/0/0", "neck/c/2/0/0/0"]
    # Its record under another name.
    (ledger / "shard-000001.json").write_bytes(record)
    assert verify(copy).damage == ["ledger/shard-000001.json is the record of 2"]
    (ledger / "shard-000001.json").unlink()
    # The record of another store.
    other = kit.fill(kit.open(tmp_path / "other", kit.spec(two_levels=True, encoder="vit_b"), 9))
    shutil.copy(other.path / "ledger/shard-000002.json", ledger)
    assert "ledger/shard-000002.json is of another store" in verify(copy).damage
    with pytest.raises(DamageError, match="shard-000002.json is of another store"):
        EmbeddingStore.open(copy)
    (ledger / "shard-000002.json").write_bytes(record)
    assert verify(copy).ok
    # Prepare records.
    (ledger / "prepare-000000.json").unlink()
    assert "ledger/prepare-000000.json is missing" in verify(copy).damage
    with pytest.raises(DamageError, match="prepare-000000.json is missing"):
        EmbeddingStore.open(copy)


def test_repair_removes_just_the_damaged_shards_which_embed_makes_again(copy, kit):
    flip(copy / shard_path("neck", 0), 10, 0)
    (copy / "ledger/shard-000002.json").write_bytes(b"{}")
    shutil.rmtree(copy / "images/0/id")
    report = verify(copy, repair=True)
    assert report.repaired == [0]
    assert "row 0 of level neck in neck/c/0/0/0/0 does not match its checksum" in report.damage
    report = verify(copy)
    assert {what.split("/")[0] for what in report.damage} == {"images"}  # beyond repair
    assert report.uncommitted == [0, 2]
    assert report.orphans == ["early/c/2/0/0/0", "neck/c/2/0/0/0"]


def test_after_a_repair_embed_gives_the_same_store(copy, kit):
    shards = {path: path.read_bytes() for path in copy.glob(shard_path("*", "*"))}
    untouched = {path: path.stat().st_mtime_ns for path in copy.glob(shard_path("*", "1"))}
    flip(copy / shard_path("neck", 0), 10, 0)
    flip(copy / "ledger/shard-000002.json", 30, 1)
    verify(copy, repair=True)
    store = kit.fill(EmbeddingStore.open(copy), failing=[1])
    assert verify(store).ok
    assert {path: path.read_bytes() for path in shards} == shards
    assert {path: path.stat().st_mtime_ns for path in untouched} == untouched
    assert (store.row_states == OK).sum() == 6
    assert store.content_hashes[store.images.rows[-1]].decode() == kit.content(8)


def test_a_damaged_shard_that_was_never_committed_blocks_until_repaired(copy, kit):
    (copy / "ledger/shard-000002.json").unlink()
    flip(copy / shard_path("neck", 2), 10, 0)
    store = EmbeddingStore.open(copy)
    with pytest.raises(DamageError, match="was never committed and is damaged"), store.writing(store.shards()[2]):
        pass
    assert verify(copy, repair=True).repaired == [2]
    store = kit.fill(store)
    assert verify(store).ok
    out = store.reader().empty(1)
    store.reader().read([8], out)
    assert torch.equal(out["neck"][0], torch.from_numpy(kit.values(8, store.spec)["neck"]).half())


def test_compacting_loses_nothing(copy, kit):
    before = EmbeddingStore.open(copy)
    before.compact()
    assert sorted(path.name for path in (copy / "ledger").glob("*.json")) == [
        "compact.json",
        "objects-extra.json",
        "prepare-000000.json",
        "prepare-000001.json",
        "zarr.json",
    ]
    after = EmbeddingStore.open(copy)
    assert after.row_states.tolist() == before.row_states.tolist()
    assert after.failures() == before.failures() == [(1, "truncated JPEG")]
    assert after.content_hashes.tolist() == before.content_hashes.tolist()
    assert verify(after).ok


def test_an_interrupted_compaction_loses_nothing(copy, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    def stop_before_it_counts(path, data, replace=durable.replace):
        stop() if path.name == "compact.json" else replace(path, data)

    monkeypatch.setattr(durable, "replace", stop_before_it_counts)
    with pytest.raises(KeyboardInterrupt):
        EmbeddingStore.open(copy).compact()
    monkeypatch.undo()
    assert verify(copy).ok
    assert len(verify(copy).leftovers) == 1
    monkeypatch.setattr("pathlib.Path.unlink", stop)
    with pytest.raises(KeyboardInterrupt):
        EmbeddingStore.open(copy).compact()
    monkeypatch.undo()
    assert verify(copy).ok
    assert len(verify(copy).leftovers) == 1  # what was superseded, instead of what did not count
    store = EmbeddingStore.open(copy)
    assert not store.uncommitted()
    store.compact()
    assert verify(copy).leftovers == []


def test_another_process_may_compact_meanwhile(copy, kit):
    store = kit.open(copy, kit.spec(two_levels=True), 9)
    other = EmbeddingStore.open(copy)
    assert [shard.index for shard in store.uncommitted()] == [3]
    kit.fill(other).compact()
    assert store.uncommitted() == []
    assert store.row_states.tolist() == EmbeddingStore.open(copy).row_states.tolist()
