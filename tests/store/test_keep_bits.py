"""Levels with a part of their mantissa: as numcodecs rounds them, and readable by anyone."""

import json

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st
from numcodecs import BitRound

from sam_cache.errors import StoreError
from sam_cache.store import FAILED, OK, EmbeddingStore, LevelSpec, StoreSpec, verify
from sam_cache.store.codecs import to_stored
from sam_cache.store.layout import level_metadata

MANTISSA = {"fp16": 10, "bf16": 7, "fp32": 23}
KINDS = [(dtype, keep) for dtype, most in MANTISSA.items() for keep in range(1, most + 1)]


def stored_as(value: np.ndarray, dtype: str, keep: int | None) -> np.ndarray:
    """What a level's array holds of `value`, as fp32."""
    level = LevelSpec(1, 1, value.size, dtype, keep_bits=keep)
    stored = to_stored(value.reshape(1, 1, -1), "neck", level)["neck"]
    return torch.from_numpy(stored).view(level.stored.torch_dtype).float().numpy()


def by_numcodecs(value: np.ndarray, dtype: str, keep: int) -> np.ndarray:
    """bf16 is fp32 with fewer bits, and rounding does not see which of them are there."""
    typed = stored_as(value, dtype, None)
    typed = typed.astype(np.float16) if dtype == "fp16" else typed
    rounded = BitRound(keepbits=keep).encode(typed)
    return np.asarray(rounded).view(typed.dtype).astype(np.float32)


@pytest.mark.parametrize(("dtype", "keep"), KINDS)
def test_rounded_as_numcodecs_does(dtype, keep):
    draw = np.random.default_rng(keep)
    value = np.concatenate([draw.normal(size=500) * 10.0 ** draw.integers(-8, 4, 500), [0.0, -0.0, 1.5, -2.5, 6e-8]])
    value = value.astype(np.float32)
    found = stored_as(value, dtype, keep)
    np.testing.assert_array_equal(found.view(np.uint32), by_numcodecs(value, dtype, keep).view(np.uint32))
    if keep < MANTISSA[dtype]:
        assert (found != stored_as(value, dtype, None)).any()


@given(st.lists(st.floats(-6e4, 6e4, width=16), min_size=1), st.integers(1, 10))
def test_any_fp16_is_rounded_as_numcodecs_does_or_refused(values, keep):
    value = np.array(values, np.float16)
    expected = by_numcodecs(value, "fp16", keep)
    if np.isfinite(expected).all():
        np.testing.assert_array_equal(stored_as(value, "fp16", keep), expected)
    else:
        with pytest.raises(ValueError, match="exceeds fp16"):
            stored_as(value, "fp16", keep)


def test_halves_go_to_the_even_neighbour_and_what_was_given_stays():
    value = np.array([1.125, 1.375, 1.126, -1.125], np.float16)
    before = value.copy()
    assert stored_as(value, "fp16", 2).tolist() == [1.0, 1.5, 1.25, -1.0]
    np.testing.assert_array_equal(value, before)


def spec_of(kit, dtype: str, codec: str, keep: int) -> StoreSpec:
    return kit.spec(levels={"neck": LevelSpec(4, 8, 8, dtype, codec, keep)})


@pytest.mark.parametrize("codec", ["raw", "blosc", "zstd"])
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_any_reader_reads_it_and_only_standard_codecs_are_named(tmp_path, kit, dtype, codec):
    spec = spec_of(kit, dtype, codec, 5)
    store = kit.fill(kit.open(tmp_path / "s", spec, 6))
    assert verify(store).ok
    given = np.stack([kit.values(row, spec)["neck"] for row in range(6)])
    expected = by_numcodecs(given, dtype, 5).reshape(given.shape)
    np.testing.assert_array_equal(zarr.open_array(store.path / "neck", mode="r")[:6].astype(np.float32), expected)
    out = store.reader().empty(6)
    store.reader().read(range(6), out)
    np.testing.assert_array_equal(out["neck"].float().numpy(), expected)
    metadata = json.loads((store.path / "neck/zarr.json").read_bytes())
    names = {each["name"] for each in metadata["codecs"][0]["configuration"]["codecs"]}
    assert names <= {"bytes", "blosc", "zstd", "crc32c"}
    assert metadata["attributes"] == {"samcache": {"dtype": dtype, "keep_bits": 5}}


def test_fewer_bits_take_fewer_bytes(tmp_path, kit):
    sizes = []
    for keep in (10, 7, 3):
        levels = {"neck": LevelSpec(16, 32, 32, "fp16", "blosc", keep)}
        store = kit.fill(kit.open(tmp_path / str(keep), kit.spec(levels=levels), 4))
        sizes.append(store.bytes_on_disk()["neck"])
    assert sizes[0] > 1.2 * sizes[1] > 1.44 * sizes[2]


@pytest.mark.parametrize(
    ("odd", "reason"), [(65500.0, "exceeds fp16"), (-np.inf, "not finite"), (np.nan, "not finite")]
)
def test_what_rounding_makes_infinite_becomes_a_failed_row(tmp_path, kit, odd, reason):
    store = kit.open(tmp_path / "s", spec_of(kit, "fp16", "raw", 3), 2)
    with store.writing(store.shards()[0]) as writer:
        value = kit.values(0, store.spec)
        value["neck"][1, 2, 3] = odd
        assert not writer.append(0, value, kit.content(0))
        assert writer.append(1, kit.values(1, store.spec), kit.content(1))
    store = EmbeddingStore.open(store.path)
    assert store.row_states[:2].tolist() == [FAILED, OK]
    assert store.failures()[0][1].startswith(f"{reason}: ")


def test_a_nan_of_any_bits_is_found():
    bits = np.array([0x7FFF, 0xFFFF, 0x7C01, 0xFC01], np.uint16).view(np.float16)
    for value in bits:
        for keep in (None, 1, 3, 10):
            with pytest.raises(ValueError, match="not finite: 1 of 2"):
                stored_as(np.array([1, value], np.float16), "fp16", keep)


def test_it_is_identity_and_told_by_name(tmp_path, kit):
    kit.open(tmp_path / "s", spec_of(kit, "fp16", "raw", 5), 2)
    with pytest.raises(StoreError, match="levels.neck.keep_bits: 5 != 7"):
        kit.open(tmp_path / "s", spec_of(kit, "fp16", "raw", 7), 2)
    with pytest.raises(StoreError, match="levels.neck.keep_bits: 5 != 'absent'"):
        kit.open(tmp_path / "s", kit.spec(), 2)


def test_stores_without_it_are_what_they_were(kit):
    for spec in (kit.spec(), kit.spec("int8"), kit.spec(early_dtype="int8")):
        identity = spec.to_json()
        assert all("keep_bits" not in level for level in identity["levels"].values())
        assert StoreSpec.from_json(identity) == spec
    rounded = spec_of(kit, "fp16", "raw", 5)
    assert StoreSpec.from_json(rounded.to_json()) == rounded
    assert b"keep_bits" not in level_metadata(LevelSpec(4, 8, 8, "fp16"), 4, 4)


@pytest.mark.parametrize(("dtype", "keep"), [("fp16", 11), ("bf16", 8), ("fp32", 24), ("fp16", 0), ("int8", 3)])
def test_bits_that_a_type_does_not_have_are_refused(dtype, keep):
    with pytest.raises(ValueError, match=f"keep_bits {keep} of {dtype}: "):
        LevelSpec(4, 8, 8, dtype, keep_bits=keep)
