"""What we write, every Zarr reader reads; what zarr-python writes, we read."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import torch
import zarr

from sam_cache.store import ABSENT, FAILED, HOLE, OK, EmbeddingStore, LevelSpec, verify
from sam_cache.store.layout import level_metadata, shard_path
from sam_cache.store.ledger import seal
from sam_cache.store.shard_file import examine

KINDS = [(dtype, codec) for dtype in ("fp16", "fp32", "bf16") for codec in ("raw", "zstd", "blosc")]


def read_by_tensorstore(path: Path) -> np.ndarray:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return tensorstore.open(spec, read=True).result().read().result()


def as_floats(array: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bf16":
        assert array.dtype == np.uint16
        return torch.from_numpy(array.astype(np.int32) << 16).view(torch.float32).numpy()
    return array.astype(np.float32)


def expected(kit, spec, row: int, name: str = "neck") -> np.ndarray:
    values = torch.from_numpy(kit.values(row, spec)[name])
    return values.to(spec.levels[name].stored.torch_dtype).to(torch.float32).numpy()


@pytest.mark.parametrize(("dtype", "codec"), KINDS)
def test_other_libraries_and_our_reader_read_the_same(tmp_path, kit, dtype, codec):
    """Ten images in shards of four, one failed, then three more: a partial last shard, holes, growth."""
    spec = kit.spec(dtype, codec, two_levels=True)
    kit.fill(kit.open(tmp_path / "s", spec, 10), failing=[5])
    store = kit.fill(kit.open(tmp_path / "s", spec, 13))
    states = store.row_states
    assert states.tolist() == [OK] * 5 + [FAILED] + [OK] * 4 + [HOLE] * 2 + [OK] * 3

    reader = store.reader(("early", "neck"))
    for name in spec.levels:
        by_zarr = as_floats(zarr.open_array(tmp_path / "s" / name, mode="r")[:], dtype)
        by_tensorstore = as_floats(read_by_tensorstore(tmp_path / "s" / name), dtype)
        np.testing.assert_array_equal(by_zarr, by_tensorstore)
        assert by_zarr.shape == (15, *spec.levels[name].shape)
        for row, state in enumerate(states):
            if state == OK:
                np.testing.assert_array_equal(by_zarr[row], expected(kit, spec, row, name))
            else:
                assert np.isnan(by_zarr[row]).all()
        rows = np.flatnonzero(states == OK)[::-1]
        out, trusting = reader.empty(len(rows)), reader.empty(len(rows))
        reader.read(rows, out)
        np.testing.assert_array_equal(out[name].to(torch.float32).numpy(), by_zarr[rows])
        assert out[name].dtype == spec.levels[name].stored.torch_dtype
        store.reader(("early", "neck"), verify=False).read(rows, trusting)
        assert torch.equal(trusting[name], out[name])


@pytest.mark.parametrize(("dtype", "codec"), [("fp16", "raw"), ("fp32", "zstd"), ("bf16", "blosc")])
def test_a_shard_that_zarr_python_wrote_is_taken_in(tmp_path, kit, dtype, codec):
    """A file with a shard's name and no record is verified and adopted, whoever wrote it."""
    spec = kit.spec(dtype, codec)
    store = kit.open(tmp_path / "s", spec, 6)
    stored = np.stack([kit.values(row, spec)["neck"] for row in range(6)])
    if dtype == "bf16":
        stored = torch.from_numpy(stored).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    zarr.open_array(tmp_path / "s" / "neck", mode="r+")[:] = stored
    before = {path: path.read_bytes() for path in (tmp_path / "s" / "neck").rglob("0") if path.is_file()}
    assert not verify(store).damage
    assert len(verify(store).orphans) == 2

    store = kit.fill(store)
    assert {path: path.read_bytes() for path in before} == before
    assert (store.row_states == OK).all()
    assert verify(store).ok
    out = store.reader().empty(6)
    store.reader().read(range(6), out)
    np.testing.assert_array_equal(
        out["neck"].to(torch.float32).numpy(), np.stack([expected(kit, spec, row) for row in range(6)])
    )


def test_raw_rows_stand_on_pages(tmp_path, kit):
    store = kit.fill(kit.open(tmp_path / "s", kit.spec("fp32"), 4))
    extents = examine(store.path / shard_path("neck", 0), 4).extents
    assert [extent.offset for extent in extents] == [0, 4096, 8192, 12288]
    assert {extent.length for extent in extents} == {4 * 8 * 8 * 4 + 4}


def test_every_node_lists_without_a_warning(tmp_path, kit):
    store = kit.fill(kit.open(tmp_path / "s", kit.spec(two_levels=True), 5))
    store.set_objects("other", {"row": np.arange(2)}, {})
    store.compact()
    group = zarr.open_group(store.path, mode="r")
    assert {name for name, _ in group.members()} == {"neck", "early", "images", "objects", "base", "ledger"}
    nodes = dict(group.members(max_depth=None))
    assert {"images/0/path/offsets", "objects/main/0/rle/data", "base/weights"} <= nodes.keys()
    assert dict(group["objects/main/0"].attrs) == {"categories": {"1": "cat"}}
    assert dict(group["neck"].attrs) == {"samcache": {"dtype": "fp16"}}
    assert nodes["neck"].metadata.dimension_names == ("row", "channel", "y", "x")


def test_identity_and_metadata_are_in_plain_sight(tmp_path, kit):
    spec = kit.spec()
    store = kit.open(tmp_path / "s", spec, 5)
    attributes = json.loads((store.path / "zarr.json").read_bytes())["attributes"]["samcache"]
    assert attributes == {"format": 3, "identity": spec.to_json(), "recorded": {"torch": "x"}}
    assert (store.path / "neck/zarr.json").read_bytes() == level_metadata(spec.levels["neck"], 5, 4)
    assert store.recorded == {"torch": "x"}
    assert store.row_states.tolist() == [ABSENT] * 5


def test_the_metadata_of_older_stores_has_not_changed_by_a_byte():
    """Verify compares it with what was committed. The digest was taken before there was int8."""
    texts = [level_metadata(LevelSpec(4, 8, 8, dtype, codec), 10, 4) for dtype, codec in KINDS]
    digest = hashlib.sha256(b"".join(texts)).hexdigest()
    assert digest == "6cec78e5baa0397410973881bb54dcf99e0c58961e3c6a63145063963caadaf2"


def test_a_moved_store_is_the_same_store(tmp_path, kit):
    kit.fill(kit.open(tmp_path / "s", kit.spec(), 5))
    shutil.move(tmp_path / "s", tmp_path / "elsewhere")
    assert verify(tmp_path / "elsewhere").ok
    assert EmbeddingStore.open(str(tmp_path / "elsewhere")).reader() is not None


def test_a_sealed_record_ends_with_its_digest():
    assert seal({"b": 1, "a": [2]}).startswith(b'{"a":[2],"b":1,"digest":"')
