"""What writing a shard owes to the caller, to the disk and to whoever checks the file."""

import errno
import os
from contextlib import suppress
from hashlib import sha256

import numpy as np
import pytest
import torch

from sam_cache.store import EmbeddingStore, LevelSpec, verify
from sam_cache.store.layout import index_size, raw_file_size, shard_path
from sam_cache.store.shard_file import examine


def digests(store: EmbeddingStore) -> dict[str, str]:
    """Of every shard file."""
    paths = sorted(store.path.glob(shard_path("*", "*")))
    return {path.relative_to(store.path).as_posix(): sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture
def spec(kit):
    return kit.spec("fp16", two_levels=True)


@pytest.fixture
def store(tmp_path, kit, spec) -> EmbeddingStore:
    return kit.open(tmp_path / "s", spec, 6)


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_an_interrupted_shard_becomes_the_same_files(store, kit, kept):
    whole = kit.fill(kit.open(store.path.with_name("t"), store.spec, 6), failing=[5])
    with suppress(KeyboardInterrupt), store.writing(store.shards()[0]) as writer:
        for row in range(kept):
            writer.append(row, kit.values(row, store.spec), kit.content(row))
        raise KeyboardInterrupt
    kit.fill(store, failing=[5])
    assert len(digests(store)) == 4
    assert digests(store) == digests(whole)
    assert verify(store).ok


def test_what_was_given_may_change_as_soon_as_append_returns(store, kit):
    buffer = {name: torch.empty(level.shape, dtype=torch.float16) for name, level in store.spec.levels.items()}
    for shard in store.shards():
        with store.writing(shard) as writer:
            for row in shard.rows:
                for name, value in kit.values(row, store.spec).items():
                    buffer[name].copy_(torch.from_numpy(value))
                writer.append(row, buffer, kit.content(row))
                for value in buffer.values():
                    value.fill_(torch.nan)
    store = EmbeddingStore.open(store.path)
    assert verify(store).ok
    out = store.reader(("neck", "early")).empty(6)
    store.reader(("neck", "early")).read(range(6), out)
    for name in out:
        expected = np.stack([kit.values(row, store.spec)[name] for row in range(6)]).astype(np.float16)
        np.testing.assert_array_equal(out[name].numpy(), expected)


@pytest.mark.parametrize("place", ["gap", "index", "end"])
def test_every_byte_of_a_file_is_accounted_for(store, kit, place):
    """Also those that belong to no row; whether the ledger knows the file or only finds it."""
    kit.fill(store)
    path = store.path / shard_path("neck", 0)
    data = bytearray(path.read_bytes())
    at = {"gap": 4096 - 1, "index": len(data) - index_size(4) + 2, "end": len(data) - 1}[place]
    data[at] ^= 1
    path.write_bytes(data)
    assert [shard_path("neck", 0) in what for what in verify(store).damage] == [True]
    with pytest.raises(ValueError, match="index|between"):
        examine(path, 4)


def test_a_file_that_is_longer_than_it_was_is_damaged(store, kit):
    kit.fill(store)
    with open(store.path / shard_path("neck", 1), "ab") as file:
        file.write(b"\0")
    assert not verify(store).ok


def test_room_is_taken_at_once_and_what_is_left_of_it_given_back(store, kit, monkeypatch):
    taken = []
    monkeypatch.setattr(os, "posix_fallocate", lambda file, offset, size: taken.append((offset, size)))
    kit.fill(store, failing=[0, 1])
    monkeypatch.undo()
    neck, early = (raw_file_size(level, 4, 4) for level in store.spec.levels.values())
    assert neck == 4 * 4096 + 4 * 16 + 4
    assert taken[:2] == [(0, neck), (0, early)]
    assert (store.path / shard_path("neck", 0)).stat().st_size == neck - 2 * 4096
    again = kit.fill(kit.open(store.path.with_name("t"), store.spec, 6), failing=[0, 1])
    assert digests(again) == digests(store)


@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_that_cannot_reserve_room_serves_too(store, kit, monkeypatch, error):
    def refuse(*arguments: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    assert verify(kit.fill(store)).ok


def test_a_full_disk_is_told_before_the_first_row(store, monkeypatch):
    def refuse(*arguments: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(OSError, match="No space left"), store.writing(store.shards()[0]):
        pass


def test_a_new_file_is_never_cut_to_nothing(store, kit, monkeypatch):
    """On ext4 closing such a file waits for its bytes."""
    cuts, cut = [], os.ftruncate
    monkeypatch.setattr(os, "ftruncate", lambda file, size: (cuts.append((named(file), size)), cut(file, size)))
    kit.fill(store)
    assert ("shard-000000.neck", 0) not in cuts
    assert [size for name, size in cuts if name == "shard-000000.neck"] == [
        raw_file_size(store.spec.levels["neck"], 4, 4)
    ]


def named(descriptor: int) -> str:
    return os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))


def test_the_size_of_compressed_files_is_not_known_beforehand():
    assert raw_file_size(LevelSpec(4, 8, 8, "fp16", "zstd"), 4, 4) is None
    assert raw_file_size(LevelSpec(256, 64, 64, "fp16"), 3, 4) == 3 * (2**21 + 4096) + 68
