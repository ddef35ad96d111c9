"""`embed --keep-bits`: which levels it reaches, and what is refused."""

import pytest

from sam_cache.store import EmbeddingStore

EMBED = ("embed", "--dataset", "synthetic", "--scenes", 2, "--model", "tiny", "--store", "s.zarr")


def test_embedding_with_fewer_bits_trains_like_any_store(samcache, tmp_path, capsys):
    assert samcache(*EMBED, "--keep-bits", 5, "--codec", "blosc") == 0
    store = EmbeddingStore.open(tmp_path / "s.zarr")
    assert store.spec.levels["neck"].keep_bits == 5
    out = store.reader().empty(2)
    store.reader().read([0, 1], out)
    assert (out["neck"].numpy().view("u2") & 0b11111 == 0).all()
    assert samcache("verify", "--store", "s.zarr") == 0
    assert samcache("info", "--store", "s.zarr") == 0
    assert "'keep_bits': 5" in capsys.readouterr().out
    assert samcache("train-top", "--store", "s.zarr", "--steps", 1, "--out", "run", "--prompts", "box") == 0
    assert samcache(*EMBED, "--keep-bits", 6, "--codec", "blosc") == 1
    assert "levels.neck.keep_bits: 5 != 6" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dtype", "int8"), "--keep-bits 8: int8 has no mantissa to cut; leave it, or choose --dtype fp16"),
        (("--dtype", "bf16"), "--keep-bits 8: bf16 has 7 bits of mantissa; give at most 7"),
        (("--levels", "neck,early", "--early-dtype", "bf16"), "--keep-bits 8: bf16 has 7 bits"),
    ],
)
def test_bits_that_no_level_has_are_refused_before_anything_is_written(samcache, tmp_path, capsys, options, message):
    assert samcache(*EMBED, "--keep-bits", 8, *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "s.zarr").exists()


def test_beside_an_early_level_of_int8_it_reaches_the_neck(samcache, tmp_path):
    assert samcache(*EMBED, "--keep-bits", 7, "--levels", "neck,early", "--early-dtype", "int8") == 0
    levels = EmbeddingStore.open(tmp_path / "s.zarr").spec.levels
    assert {name: level.keep_bits for name, level in levels.items()} == {"neck": 7, "early": None}
