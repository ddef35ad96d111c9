"""Levels of int8: three arrays that stand or fall together, and that any Zarr reader puts together again."""

import json
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import torch
import zarr

from sam_cache.errors import DamageError, StoreError
from sam_cache.quantisation import dequantise
from sam_cache.store import FAILED, HOLE, OK, EmbeddingStore, LevelSpec, Ring, verify
from sam_cache.store.layout import shard_path

ARRAYS = ("early", "early_scale", "early_offset")


def by_zarr(path: Path) -> np.ndarray:
    return zarr.open_array(path, mode="r")[:]


def by_tensorstore(path: Path) -> np.ndarray:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return tensorstore.open(spec, read=True).result().read().result()


def broadcast(path: Path, read) -> tuple[np.ndarray, np.ndarray]:
    """Level `early` in fp32 as any reader would undo it, and its scale."""
    quantised, scale, offset = (read(path / name) for name in ARRAYS)
    return quantised * scale + offset, scale


def write_one(path: Path, kit, value: np.ndarray) -> EmbeddingStore:
    """A store of one row whose level is `value`, as int8."""
    store = kit.open(path, kit.spec(levels={"early": LevelSpec(*value.shape, "int8")}), 1)
    with store.writing(store.shards()[0]) as writer:
        writer.append(0, {"early": value}, kit.content(0))
    return store


@pytest.fixture(scope="module")
def whole(tmp_path_factory, kit) -> EmbeddingStore:
    """Six rows in two shards; row 1 has failed."""
    return kit.fill(kit.open(tmp_path_factory.mktemp("int8") / "s", kit.spec(early_dtype="int8"), 6), failing=[1])


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return shutil.copytree(whole.path, tmp_path / "s")


@pytest.mark.parametrize("codec", ["raw", "zstd", "blosc"])
def test_any_reader_puts_the_values_together_by_broadcasting(tmp_path, kit, codec):
    """Ten images in shards of four, one failed, then three more, beside a neck of fp16."""
    spec, path = kit.spec(codec=codec, early_dtype="int8"), tmp_path / "s"
    kit.fill(kit.open(path, spec, 10), failing=[5])
    store = kit.fill(kit.open(path, spec, 13))
    states = store.row_states
    assert states.tolist() == [OK] * 5 + [FAILED] + [OK] * 4 + [HOLE] * 2 + [OK] * 3
    assert verify(store).ok

    for read in (by_zarr, by_tensorstore):
        neck, (early, scale) = read(path / "neck"), broadcast(path, read)
        assert (neck.shape, early.shape, scale.shape) == ((15, 4, 8, 8), (15, 6, 8, 8), (15, 6, 1, 1))
        for row, state in enumerate(states):
            if state == OK:
                given = kit.values(row, spec)
                np.testing.assert_array_equal(neck[row], given["neck"].astype(np.float16))
                assert (abs(early[row] - given["early"]) <= 0.5001 * scale[row]).all()
                assert (scale[row] < 0.05).all()  # of values that reach to about 3
            else:
                assert np.isnan(neck[row]).all()
                assert np.isnan(early[row]).all()

    reader, rows = store.reader(("early", "neck")), np.flatnonzero(states == OK)[::-1]
    out = reader.empty(len(rows))
    reader.read(rows, out)
    assert {name: (tensor.dtype, tuple(tensor.shape[1:])) for name, tensor in out.items()} == {
        "early": (torch.int8, (6, 8, 8)),
        "early_scale": (torch.float32, (6, 1, 1)),
        "early_offset": (torch.float32, (6, 1, 1)),
        "neck": (torch.float16, (4, 8, 8)),
    }
    for name in ARRAYS:
        np.testing.assert_array_equal(out[name].numpy(), by_zarr(path / name)[rows])
    assert dequantise(out, "neck") is out["neck"]
    expected = broadcast(path, by_zarr)[0][rows]
    np.testing.assert_allclose(dequantise(out, "early").numpy(), expected, rtol=1e-6, atol=1e-6)


def test_channels_of_very_different_range_each_keep_their_precision(tmp_path, kit):
    magnitudes = np.float32(10.0) ** np.arange(-6, 7, 3)
    value = np.random.default_rng(0).normal(size=(5, 8, 8)).astype(np.float32) * magnitudes[:, None, None]
    value[2] += 50
    store = write_one(tmp_path / "s", kit, value)
    early, scale = broadcast(store.path, by_zarr)
    assert (abs(early[0] - value) <= 0.5001 * scale[0]).all()
    np.testing.assert_allclose(scale[0, :, 0, 0], np.ptp(value, axis=(1, 2)) / 254, rtol=1e-5)


def test_a_constant_channel_is_exact(tmp_path, kit):
    value = np.array([0.0, -3.7, 1e-30, 3e38], np.float32)[:, None, None] * np.ones((4, 8, 8), np.float32)
    early, _ = broadcast(write_one(tmp_path / "s", kit, value).path, by_zarr)
    np.testing.assert_array_equal(early[0], value)


@pytest.mark.parametrize(
    ("odd", "reason"), [(np.nan, "not finite"), (np.inf, "not finite"), (-np.inf, "not finite"), (1e39, "exceeds fp32")]
)
def test_what_int8_cannot_hold_becomes_a_failed_row(tmp_path, kit, odd, reason):
    spec = kit.spec(early_dtype="int8")
    store = kit.open(tmp_path / "s", spec, 2)
    with store.writing(store.shards()[0]) as writer:
        value = kit.values(0, spec)
        value["early"] = value["early"].astype(np.float64)
        value["early"][1, 2, 3] = value["early"][4, 0, 0] = odd
        assert not writer.append(0, value, kit.content(0))
        assert writer.append(1, kit.values(1, spec), kit.content(1))
    assert store.failures() == [(0, f"{reason}: 2 of 384 values of level early")]
    assert np.isnan(broadcast(store.path, by_zarr)[0][0]).all()
    assert verify(store).ok


def test_any_float_type_is_taken_and_the_tensor_is_left_alone(tmp_path, kit):
    spec = kit.spec(levels={"early": LevelSpec(6, 8, 8, "int8")})
    store = kit.open(tmp_path / "s", spec, 4)
    value = torch.from_numpy(kit.values(0, spec)["early"]).to(torch.bfloat16)
    before = value.clone()
    forms = [value, value.half(), value.float().requires_grad_(), value.permute(2, 0, 1).contiguous().permute(1, 2, 0)]
    with store.writing(store.shards()[0]) as writer:
        for row, form in enumerate(forms):
            assert writer.append(row, {"early": form}, kit.content(row))
    assert torch.equal(value, before)
    for name in ARRAYS:
        assert (by_zarr(store.path / name) == by_zarr(store.path / name)[:1]).all()


@pytest.mark.parametrize("rows", [1, 3])
def test_an_interrupted_shard_ends_up_the_same(tmp_path, kit, whole, rows):
    store = kit.open(tmp_path / "s", whole.spec, 6)
    with suppress(KeyboardInterrupt), store.writing(store.shards()[0]) as writer:
        for row in [0, 2, 3][:rows]:
            writer.append(row, kit.values(row, store.spec), kit.content(row))
        raise KeyboardInterrupt
    assert {f"ledger/partial/shard-000000.{name}" for name in ARRAYS} < {*verify(store).leftovers}
    kit.fill(store, failing=[1])
    assert verify(store).leftovers == []
    shards = sorted(path.relative_to(whole.path) for path in whole.path.glob(shard_path("*", "*")))
    assert len(shards) == 8
    for shard in shards:
        assert (store.path / shard).read_bytes() == (whole.path / shard).read_bytes()


@pytest.mark.parametrize("array", ARRAYS)
def test_a_flipped_bit_in_any_of_the_three_files_is_found_and_repaired(copy, kit, array):
    before = {path: path.read_bytes() for path in copy.glob(shard_path("*", "*"))}
    untouched = {path: path.stat().st_mtime_ns for path in copy.glob(shard_path("*", "1"))}
    name = shard_path(array, 0)
    data = bytearray(before[copy / name])
    data[4096 + 5] ^= 1  # the second row that stands there: row 1 has failed
    (copy / name).write_bytes(data)

    report = verify(copy)
    assert report.damage == [f"row 2 of level {array} in {name} does not match its checksum"]
    assert report.damaged_rows == [(array, 2, name)]
    reader = EmbeddingStore.open(copy).reader(("early",))
    reader.read([0, 3], reader.empty(2))
    with pytest.raises(DamageError, match=f"row 2 of level {array} in {name} is damaged"):
        reader.read([2], reader.empty(1))

    assert verify(copy, repair=True).repaired == [0]
    assert not [*copy.glob(shard_path("*", "0"))]
    store = kit.fill(EmbeddingStore.open(copy), failing=[1])
    assert verify(store).ok
    assert {path: path.read_bytes() for path in before} == before
    assert {path: path.stat().st_mtime_ns for path in untouched} == untouched


@pytest.mark.parametrize("array", ARRAYS)
def test_a_missing_file_or_array_is_damage(copy, array):
    (copy / shard_path(array, 1)).unlink()
    (copy / array / "zarr.json").unlink()
    report = verify(copy)
    assert {*report.damage} == {f"{array}/zarr.json is missing", f"{shard_path(array, 1)} is missing"}
    reader = EmbeddingStore.open(copy).reader(("neck", "early"))
    with pytest.raises(DamageError, match=f"row 4 of level {array} .* its file is missing"):
        reader.read([4], reader.empty(1))


def test_interrupted_growth_is_no_damage_whichever_array_was_ahead(copy, whole, kit, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("sam_cache.store.prepare.durable.place", stop)
    with pytest.raises(KeyboardInterrupt):
        kit.open(copy, whole.spec, 7)
    monkeypatch.undo()
    assert not verify(copy).damage
    store = kit.fill(kit.open(copy, whole.spec, 7))
    assert (verify(store).damage, verify(store).leftovers) == ([], [])
    assert by_zarr(copy / "early_scale").shape == (9, 6, 1, 1)


def test_the_ring_brings_the_companions_along(whole):
    batches = [[0, 2], [3], [5, 4, 3, 2]]
    truth = {name: torch.from_numpy(by_zarr(whole.path / name)) for name in ("neck", *ARRAYS)}
    for rows, batch in zip(batches, Ring(whole.reader(("neck", "early")), batches), strict=True):
        assert batch.keys() == truth.keys()
        assert all(torch.equal(tensor, truth[name][rows]) for name, tensor in batch.items())


def test_sizes_are_told_per_level(whole):
    assert whole.spec.row_bytes == {"neck": 4 * 8 * 8 * 2, "early": 6 * 8 * 8 + 2 * 6 * 4}
    files = {
        name: sum(p.stat().st_size for p in (whole.path / name / "c").glob("*/0/0/0")) for name in whole.spec.arrays
    }
    assert whole.bytes_on_disk() == {"neck": files["neck"], "early": sum(files[name] for name in ARRAYS)}


def test_companions_are_no_levels(whole, tmp_path, kit):
    with pytest.raises(StoreError, match="no level early_scale, only neck, early"):
        whole.reader(("early_scale",))
    fp32 = LevelSpec(6, 1, 1, "fp32")
    with pytest.raises(ValueError, match="level early_offset: this is how int8 level early calls its own array"):
        kit.spec(levels={"early_offset": fp32, "early": LevelSpec(6, 8, 8, "int8")})
    assert kit.spec(levels={"early_offset": fp32, "early": LevelSpec(6, 8, 8, "fp16")}).arrays.keys() == {
        "early_offset",
        "early",
    }


def test_the_identity_speaks_of_levels_and_the_group_shows_every_array(whole, kit):
    identity = json.loads((whole.path / "zarr.json").read_bytes())["attributes"]["samcache"]["identity"]
    assert identity["levels"].keys() == {"neck", "early"}
    assert identity["levels"]["early"]["dtype"] == "int8"
    group = zarr.open_group(whole.path, mode="r")
    assert {"neck", *ARRAYS} < {name for name, _ in group.members()}
    assert [group[name].dtype for name in ARRAYS] == [np.int8, np.float32, np.float32]
    assert group["early"].fill_value == -128
    with pytest.raises(StoreError, match="levels.early.dtype: 'int8' != 'fp16'"):
        kit.open(whole.path, kit.spec(two_levels=True), 6)
