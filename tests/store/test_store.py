"""Making, resuming, growing, refusing; tables and object sets."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from sam_cache.errors import DamageError, StoreError
from sam_cache.store import OK, EmbeddingStore, LevelSpec, Ragged, ShardBusy, StoreSpec, verify
from sam_cache.store import embedding_store as module
from sam_cache.store import prepare as prepare_module
from sam_cache.store.columns import read_column, write_table
from sam_cache.store.ledger import digests
from sam_cache.store.stored_table import StoredTable
from sam_cache.types import ImageRecord


def snapshot(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def same_table(one, other) -> bool:
    return one.keys() == other.keys() and all(
        list(a) == list(b) if isinstance(a, Ragged) else a.dtype == b.dtype and np.array_equal(a, b)
        for a, b in ((one[name], other[name]) for name in one)
    )


def test_a_new_store_has_everything_but_embeddings(tmp_path, kit):
    store = kit.open(tmp_path / "deep" / "s", kit.spec(), 5)
    assert store.images.ids.tolist() == [100, 101, 102, 103, 104]
    assert store.images.paths[3] == "folder/ö 3.jpg"
    assert (store.images.splits == "train").tolist() == [True, False, True, False, True]
    assert store.images.heights.tolist() == [30, 31, 32, 33, 34]
    assert store.images.rows.tolist() == list(range(5))
    assert store.base == b"the weights" * 100
    assert same_table(store.objects(), kit.prepare(kit.records(5)))
    assert store.object_attributes() == {"categories": {"1": "cat"}}
    assert [(shard.index, shard.rows) for shard in store.shards()] == [(0, range(4)), (1, range(4, 5))]
    assert store.uncommitted() == store.shards()
    assert sorted(os.listdir(tmp_path / "deep")) == ["s"]


def test_reopening_prepares_nothing(tmp_path, kit):
    def never(records):
        raise AssertionError("prepare was called again")

    store = kit.fill(kit.open(tmp_path / "s", kit.spec(), 5))
    before = snapshot(store.path)
    assert len(kit.open(tmp_path / "s", kit.spec(), 5, prepare=never).images) == 5
    assert len(kit.open(tmp_path / "s", kit.spec(), 2, prepare=never).images) == 5
    assert snapshot(store.path) == before


def test_growth_adds_a_segment_on_a_new_shard(tmp_path, kit):
    prepared = []

    def watched(records):
        prepared.append([record.id for record in records])
        return kit.prepare(records)

    kit.open(tmp_path / "s", kit.spec(), 5, prepare=watched)
    store = kit.open(tmp_path / "s", kit.spec(), 7, prepare=watched)
    assert prepared == [[100, 101, 102, 103, 104], [105, 106]]
    assert store.images.rows.tolist() == [0, 1, 2, 3, 4, 8, 9]
    assert store.objects()["row"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 8, 8, 9, 9]
    assert store.objects()["rle"][-1] == "folder/ö 6.jpg 1".encode()
    assert [shard.rows for shard in store.shards()] == [range(4), range(4, 5), range(8, 10)]
    assert verify(store).ok
    store = kit.fill(kit.open(tmp_path / "s", kit.spec(), 12))
    assert store.images.rows.tolist()[-5:] == [12, 13, 14, 15, 16]
    assert (store.row_states == OK).sum() == 12
    assert verify(store).ok


@pytest.mark.parametrize("step", ["rename", "replace", "place"])
def test_interrupted_growth_is_no_damage_and_is_redone(tmp_path, kit, monkeypatch, step):
    kit.fill(kit.open(tmp_path / "s", kit.spec(two_levels=True), 5))

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module.durable, step, stop)
    with pytest.raises(KeyboardInterrupt):
        kit.open(tmp_path / "s", kit.spec(two_levels=True), 7)
    monkeypatch.undo()
    report = verify(tmp_path / "s")
    assert not report.damage
    assert report.leftovers
    assert len(EmbeddingStore.open(tmp_path / "s").images) == 5
    store = kit.fill(kit.open(tmp_path / "s", kit.spec(two_levels=True), 7))
    assert len(store.images) == 7
    report = verify(store)
    assert (report.damage, report.leftovers) == ([], [])


def test_an_interrupted_first_prepare_leaves_no_store(tmp_path, kit, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module.durable, "rename", stop)
    with pytest.raises(KeyboardInterrupt):
        kit.open(tmp_path / "s", kit.spec(), 5)
    monkeypatch.undo()
    assert not (tmp_path / "s").exists()
    assert verify(kit.open(tmp_path / "s", kit.spec(), 5)).ok
    assert os.listdir(tmp_path) == ["s"]


def test_whoever_loses_the_race_without_a_lock_opens_the_other_store(tmp_path, kit):
    spec = kit.spec()

    def slow(records):
        prepare_module.create(tmp_path / "s", spec, records, kit.prepare(records), b"theirs", {}, {})
        return kit.prepare(records)

    assert kit.open(tmp_path / "s", spec, 5, prepare=slow).base == b"theirs"
    assert os.listdir(tmp_path) == ["s"]


CHANGES = {
    "encoder_sha256": {"encoder_sha256": "cd" * 32},
    "compute_dtype": {"compute_dtype": "bf16"},
    "preprocessing.fit": {"preprocessing": {"fit": "squash", "input_size": 128, "mean": 0.5}},
    "preprocessing.resize": {"preprocessing": {"fit": "longest", "input_size": 128, "mean": 0.5, "resize": "fast"}},
    "levels.neck.dtype": {"levels": {"neck": LevelSpec(4, 8, 8, "bf16")}},
    "levels.early.channels": {"levels": {"neck": LevelSpec(4, 8, 8, "fp16"), "early": LevelSpec(3, 8, 8, "fp16")}},
    "shard_rows": {"shard_rows": 8},
    "views": {"views": "identity,mirror"},
}


@pytest.mark.parametrize("field", CHANGES)
def test_another_identity_is_refused_by_name(tmp_path, kit, field):
    store = kit.open(tmp_path / "s", kit.spec(), 5)
    before = snapshot(store.path)
    with pytest.raises(StoreError) as error:
        kit.open(tmp_path / "s", kit.spec(**CHANGES[field]), 9)
    assert f"{field}: " in str(error.value)
    assert "choose another --store" in str(error.value)
    assert snapshot(store.path) == before


def test_a_refusal_names_everything_at_once_with_both_values(tmp_path, kit):
    kit.open(tmp_path / "s", kit.spec(), 5)
    images = kit.records(5)
    images[2] = replace(images[2], width=41)
    images[4] = ImageRecord(7, "else.jpg")
    spec = kit.spec(encoder="vit_b", compute_dtype="bf16")
    with pytest.raises(StoreError) as error:
        EmbeddingStore.create_or_resume(tmp_path / "s", spec, images, kit.prepare, b"", {}, {})
    text = str(error.value)
    assert "\n" not in text
    for part in (
        "encoder: 'nano' != 'vit_b'",
        "compute_dtype: 'fp32' != 'bf16'",
        "images[2] (id, path, height, width, view): (102, 'folder/ö 2.jpg', 32, 40, 'identity') != "
        "(102, 'folder/ö 2.jpg', 32, 41, 'identity')",
        " and 1 more",
    ):
        assert part in text


def test_what_is_no_store_is_refused_untouched(tmp_path, kit):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    (tmp_path / "file").write_text("text")
    (tmp_path / "empty").mkdir()
    before = snapshot(tmp_path)
    for name in ("precious", "file", "empty"):
        with pytest.raises(StoreError, match="not a samcache store; choose another --store"):
            kit.open(tmp_path / name, kit.spec(), 5)
        with pytest.raises(StoreError, match="not a samcache store"):
            verify(tmp_path / name)
    assert snapshot(tmp_path) == before
    with pytest.raises(StoreError, match="no store here; make one with `samcache embed --store"):
        EmbeddingStore.open(tmp_path / "nowhere")


def test_a_newer_format_is_refused(tmp_path, kit, monkeypatch):
    kit.open(tmp_path / "s", kit.spec(), 5)
    monkeypatch.setattr(module, "FORMAT", 2)
    with pytest.raises(StoreError, match="format 3, this samcache reads up to 2; upgrade"):
        EmbeddingStore.open(tmp_path / "s")


def test_a_spec_survives_json_and_rejects_unknown_names(kit):
    spec = kit.spec("bf16", "zstd", two_levels=True)
    assert StoreSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert spec.differences(spec) == []
    with pytest.raises(ValueError, match="choose one of fp16, fp32, bf16, int8"):
        LevelSpec(1, 1, 1, "float16")
    with pytest.raises(ValueError, match="choose one of raw, zstd, blosc"):
        LevelSpec(1, 1, 1, "fp16", "gzip")


def test_object_sets_are_added_and_replaced_whole(tmp_path, kit):
    store = kit.fill(kit.open(tmp_path / "s", kit.spec(), 5))
    store.set_objects("val-2", {"row": np.array([4]), "name": Ragged.from_list([b"x"])}, {"from": "a"})
    store.set_objects("val-2", {"row": np.array([3, 2])}, {"from": "b"})
    store.set_objects("main", {"row": np.array([1])}, {"categories": {}})
    for opened in (store, EmbeddingStore.open(store.path)):
        assert opened.object_sets() == ["main", "val-2"]
        assert opened.objects("val-2")["row"].tolist() == [3, 2]
        assert opened.objects()["row"].tolist() == [1]
        assert opened.object_attributes("val-2") == {"from": "b"}
        assert opened.object_attributes() == {"categories": {}}
        assert (opened.row_states == OK).all()
    assert (verify(store).damage, verify(store).leftovers) == ([], [])
    # Images that came later have their objects beside the replaced set.
    grown = kit.open(tmp_path / "s", kit.spec(), 6, prepare=lambda records: {"row": np.array([0])})
    assert grown.objects()["row"].tolist() == [1, 8]
    assert grown.objects("val-2")["row"].tolist() == [3, 2]
    grown.set_objects("main", {"row": np.array([8])}, {})
    assert grown.objects()["row"].tolist() == [8]
    assert (verify(grown).damage, verify(grown).leftovers) == ([], [])
    with pytest.raises(StoreError, match="no object set 'else', only main, val-2"):
        grown.objects("else")
    with pytest.raises(StoreError, match="letters, digits"):
        grown.set_objects("../up", {}, {})


def test_an_interrupted_replacement_keeps_the_old_set(tmp_path, kit, monkeypatch):
    store = kit.open(tmp_path / "s", kit.spec(), 5)

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module.durable, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        store.set_objects("main", {"row": np.array([1])}, {})
    monkeypatch.undo()
    store = EmbeddingStore.open(store.path)
    assert len(store.objects()["row"]) == 10
    assert not verify(store).damage
    store.set_objects("main", {"row": np.array([1])}, {})
    assert (verify(store).damage, verify(store).leftovers) == ([], [])


def test_columns_of_unequal_length_are_refused(tmp_path):
    with pytest.raises(StoreError, match="differ in length"):
        write_table(tmp_path / "t", {"a": np.zeros(2), "b": Ragged.from_list([b""])})


def test_no_images_and_no_objects(tmp_path, kit):
    store = kit.open(tmp_path / "s", kit.spec(), 0, prepare=lambda records: {}, base=b"")
    assert (len(store.images), store.shards(), store.objects(), store.base) == (0, [], {}, b"")
    assert verify(store).ok
    assert len(kit.fill(kit.open(tmp_path / "s", kit.spec(), 2)).objects()["row"]) == 4


@settings(max_examples=15, deadline=None)
@given(
    items=st.lists(st.binary(max_size=9), max_size=7),
    dtype=st.sampled_from(["?", "u1", "<i4", "<i8", "<f2", "<f4", "<f8"]),
    cut=st.integers(0, 7),
    chunk=st.sampled_from([1, 16, 2**20]),
)
def test_tables_come_back_as_they_went(tmp_path_factory, items, dtype, cut, chunk):
    folder = tmp_path_factory.mktemp("table") / "t"
    numbers = np.arange(len(items) * 6).reshape(-1, 2, 3).astype(dtype)
    table = {"text": Ragged.from_list(items), "numbers": numbers, "flat": numbers[:, 0, 0]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sam_cache.store.columns.CHUNK_BYTES", chunk)
        halves = [{name: _slice(column, at) for name, column in table.items()} for at in (slice(cut), slice(cut, None))]
        for part, each in {"whole": table, "none": {}, "first": halves[0], "second": halves[1]}.items():
            write_table(folder / part, each)
    for name in ("numbers", "flat", "text/data", "text/offsets"):
        stored = zarr.open_array(folder / "whole" / name, mode="r")
        assert np.array_equal(read_column(folder / "whole" / name), stored[:])
    files = digests(folder)
    back = StoredTable(folder, ["whole"], files)
    assert same_table(back, table)
    assert list(back["text"]) == items
    assert same_table(StoredTable(folder, ["none", "first", "second"], files), table)
    assert dict(StoredTable(folder, ["none"], files)) == {}


def _slice(column, part):
    return Ragged.from_list(list(column)[part]) if isinstance(column, Ragged) else column[part]


def test_a_column_is_read_and_checked_when_it_is_asked_for(tmp_path, kit):
    store = kit.fill(kit.open(tmp_path / "s", kit.spec(), 5))
    objects = store.objects()
    (file,) = (store.path / "objects/main/0/row/c").iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    assert set(objects) == set(kit.prepare(kit.records(5)))
    assert "rows" not in objects
    assert objects["rle"] is objects["rle"]
    with pytest.raises(DamageError, match="objects/main/0/row/c/0 is not what was committed"):
        objects["row"]
    with pytest.raises(KeyError):
        objects["rows"]


def test_ragged_indexes_like_a_list():
    column = Ragged.from_list([b"a", b"", b"cd"])
    assert [column[-1], column[1], len(column)] == [b"cd", b"", 3]
    with pytest.raises(IndexError):
        column[3]


def test_failures_and_contents_are_kept(tmp_path, kit):
    store = kit.fill(kit.open(tmp_path / "s", kit.spec(), 6), failing=[1, 4, 5])
    assert store.failures() == [(1, "truncated JPEG"), (4, "truncated JPEG"), (5, "truncated JPEG")]
    assert store.content_hashes.tolist()[:2] == [kit.content(0).encode(), b""]
    assert store.bytes_on_disk() == {"neck": sum(p.stat().st_size for p in (store.path / "neck/c").glob("*/0/0/0"))}


@pytest.mark.parametrize("dtype", ["fp16", "fp32", "bf16"])
def test_values_that_do_not_fit_become_failed_rows(tmp_path, kit, dtype):
    spec = kit.spec(dtype)
    store = kit.open(tmp_path / "s", spec, 4)
    with store.writing(store.shards()[0]) as writer:
        for row, odd in enumerate([np.nan, np.inf, 1e5, 65504.0]):
            value = torch.from_numpy(kit.values(row, spec)["neck"]).clone()
            value[1, 2, 3] = odd
            kept = writer.append(row, {"neck": value}, kit.content(row))
            assert kept == (row == 3 or (row == 2 and dtype != "fp16"))
    reasons = dict(store.failures())
    assert reasons[0] == "not finite: 1 of 256 values of level neck"
    assert reasons[1] == "not finite: 1 of 256 values of level neck"
    assert reasons.get(2) == ("exceeds fp16: 1 of 256 values of level neck" if dtype == "fp16" else None)


def test_any_float_type_and_layout_is_taken(tmp_path, kit):
    spec = kit.spec("fp16")
    store = kit.open(tmp_path / "s", spec, 4)
    value = torch.from_numpy(kit.values(0, spec)["neck"]).to(torch.float16)
    frozen = value.numpy().copy()
    frozen.flags.writeable = False
    forms = [value, value.float().requires_grad_(), frozen, value.permute(2, 0, 1).contiguous().permute(1, 2, 0)]
    with store.writing(store.shards()[0]) as writer:
        for row, form in reversed(list(enumerate(forms))):
            assert writer.append(row, {"neck": form}, kit.content(row))
    out = store.reader().empty(4)
    store.reader().read(range(4), out)
    assert all(torch.equal(row, value) for row in out["neck"])


def test_a_writer_wants_each_row_of_its_shard_once(tmp_path, kit):
    spec = kit.spec()
    store = kit.open(tmp_path / "s", spec, 5)
    shard = store.shards()[0]

    def write_half():
        with store.writing(shard) as writer:
            writer.fail(0, "bad")
            writer.append(1, kit.values(1, spec), "")
            with pytest.raises(ValueError, match="row 1 is not of shard 0, or was given before"):
                writer.append(1, kit.values(1, spec), "")
            with pytest.raises(ValueError, match="row 4 is not of shard 0"):
                writer.fail(4, "bad")
            with pytest.raises(ValueError, match=r"level neck of row 2 is \(4, 8, 7\), not \(4, 8, 8\)"):
                writer.append(2, {"neck": np.zeros((4, 8, 7))}, "")

    with pytest.raises(StoreError, match=r"no value and no failure for rows \[2, 3\]"):
        write_half()
    assert not store.committed(shard)
    kit.fill(store)
    with pytest.raises(ShardBusy, match="committed already"), store.writing(shard):
        pass


def test_damaged_records_stop_an_open(tmp_path, kit):
    store = kit.fill(kit.open(tmp_path / "s", kit.spec(), 5))
    record = store.path / "ledger/shard-000001.json"
    record.write_bytes(record.read_bytes().replace(b'"states":[1', b'"states":[2'))
    with pytest.raises(DamageError, match=r"ledger/shard-000001.json is not the record .*samcache verify"):
        EmbeddingStore.open(store.path)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40), max_size=9),
    st.sampled_from([1, 2, 2**16]),
)
def test_text_comes_back_as_it_went(texts, at_once):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sam_cache.store.columns.TEXTS_AT_ONCE", at_once)
        column = Ragged.from_list([text.encode() for text in texts]).to_text()
    assert column.tolist() == texts
    assert column.dtype == np.dtypes.StringDType()
