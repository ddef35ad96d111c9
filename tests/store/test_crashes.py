"""A shard is committed whole or not at all, whatever stops a writer and wherever."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from sam_cache.store import OK, EmbeddingStore, ShardBusy, verify
from sam_cache.store.layout import shard_path

IMAGES = 4


@pytest.fixture(scope="module")
def spec(kit):
    return kit.spec(codec="zstd", early_dtype="int8")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, kit, spec) -> Path:
    return kit.open(tmp_path_factory.mktemp("crashes") / "s", spec, IMAGES).path


@pytest.fixture(scope="module")
def uninterrupted(prepared, tmp_path_factory, kit) -> dict[str, bytes]:
    path = shutil.copytree(prepared, tmp_path_factory.mktemp("uninterrupted") / "s")
    kit.fill(EmbeddingStore.open(path))
    return shards_and_records(path)


def shards_and_records(path: Path) -> dict[str, bytes]:
    files = [*path.glob(shard_path("*", "*")), *(path / "ledger").glob("shard-*.json")]
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


CALLS = ("pwrite", "write", "link", "unlink", "mkdir", "ftruncate")


class PowerCut(BaseException):
    pass


def cut_after(patch, calls: int) -> None:
    """From the given call on, every operation on files fails, as for a process that is gone."""
    left = [calls]

    def guard(call):
        def guarded(*arguments, **options):
            left[0] -= 1
            if left[0] < 0:
                raise PowerCut
            return call(*arguments, **options)

        return guarded

    for name in CALLS:
        patch.setattr(os, name, guard(getattr(os, name)))


def test_stopped_at_any_call_the_store_ends_up_the_same(prepared, uninterrupted, tmp_path, kit):
    stopped = 0
    while True:
        path = shutil.copytree(prepared, tmp_path / str(stopped))
        store = EmbeddingStore.open(path)
        with pytest.MonkeyPatch.context() as patch:
            cut_after(patch, stopped)
            try:
                kit.write(store)
                break
            except PowerCut:
                stopped += 1
        assert not verify(path).damage
        store = EmbeddingStore.open(path)
        kit.write(store)
        assert shards_and_records(path) == uninterrupted
        store.compact()
        assert os.listdir(path / "ledger/partial") == []
        shutil.rmtree(path)
    assert stopped > 25


def interrupt(path: Path, kit, rows: int) -> EmbeddingStore:
    store = EmbeddingStore.open(path)
    with suppress(KeyboardInterrupt), store.writing(store.shards()[0]) as writer:
        for row in range(rows):
            writer.append(row, kit.values(row, store.spec), kit.content(row))
        raise KeyboardInterrupt
    assert not store.committed(store.shards()[0])
    return store


@pytest.mark.parametrize("array", ["early", "early_scale"])
@pytest.mark.parametrize("harm", ["none", "flip", "zero", "cut", "torn journal", "no journal", "no partial", "extra"])
def test_only_whole_rows_are_kept(prepared, uninterrupted, tmp_path, kit, harm, array):
    path = shutil.copytree(prepared, tmp_path / "s")
    store = interrupt(path, kit, 3)
    partial, journal = path / f"ledger/partial/shard-000000.{array}", path / "ledger/partial/shard-000000.journal"
    data, kept = bytearray(partial.read_bytes()), {0, 1, 2}
    match harm:
        case "flip":
            data[4096 + 7] ^= 1
            kept = {0}
        case "zero":
            data[4096:8192] = bytes(4096)
            kept = {0}
        case "cut":
            del data[8192 + 100 :]
            kept = {0, 1}
        case "extra":
            data += b"half a row"
        case "torn journal":
            os.truncate(journal, journal.stat().st_size - 5)
            kept = {0, 1}
        case "no journal":
            journal.unlink()
            kept = set()
        case "no partial":
            data.clear()
            kept = set()
    partial.write_bytes(data)
    report = verify(path)
    assert report.ok
    assert "ledger/partial/shard-000000.neck" in report.leftovers
    with store.writing(store.shards()[0]) as writer:
        assert writer.kept == kept
        for row in sorted({0, 1, 2, 3} - kept):
            assert writer.append(row, kit.values(row, store.spec), kit.content(row))
    kit.fill(store)
    assert shards_and_records(path) == uninterrupted


def test_a_failed_row_gets_another_chance_after_an_interrupt(prepared, tmp_path, kit):
    path = shutil.copytree(prepared, tmp_path / "s")
    store = EmbeddingStore.open(path)
    with suppress(KeyboardInterrupt), store.writing(store.shards()[0]) as writer:
        writer.fail(0, "disk was unplugged")
        writer.append(1, kit.values(1, store.spec), kit.content(1))
        raise KeyboardInterrupt
    assert not store.committed(store.shards()[0])
    store = kit.fill(store)
    assert (store.row_states == OK).all()
    assert verify(store).ok


def test_a_second_writer_is_told_that_the_shard_is_busy(prepared, uninterrupted, tmp_path, kit):
    path = shutil.copytree(prepared, tmp_path / "s")
    one, other = EmbeddingStore.open(path), EmbeddingStore.open(path)
    shard = one.shards()[0]
    with one.writing(shard) as writer:
        with pytest.raises(ShardBusy, match="being written by another"), other.writing(shard):
            pass
        for row in shard.rows:
            writer.append(row, kit.values(row, one.spec), kit.content(row))
    with pytest.raises(ShardBusy, match="committed already"), other.writing(shard):
        pass
    kit.fill(other)
    assert shards_and_records(path) == uninterrupted


def test_names_follow_bytes_and_the_record_comes_last(prepared, tmp_path, kit, monkeypatch):
    """fsync(file) < link < fsync(its folder), for every array, and all of that before the record's."""
    path = shutil.copytree(prepared, tmp_path / "s")
    store = EmbeddingStore.open(path)
    log = []
    link = os.link
    monkeypatch.setattr(os, "fsync", lambda descriptor: log.append(("fsync", named(descriptor, path))))
    monkeypatch.setattr(
        os,
        "link",
        lambda source, target: (log.append(("link", target.relative_to(path).as_posix())), link(source, target)),
    )
    shard = store.shards()[0]
    with store.writing(shard) as writer:
        for row in shard.rows:
            writer.append(row, kit.values(row, store.spec), kit.content(row))
    placed = [
        (call, text.format(array))
        for array in ("neck", "early", "early_scale", "early_offset")
        for call, text in [
            ("fsync", "ledger/partial/shard-000000.{}"),
            ("fsync", "{}"),
            ("fsync", "{}/c"),
            ("fsync", "{}/c/0"),
            ("fsync", "{}/c/0/0"),
            ("link", "{}/c/0/0/0/0"),
            ("fsync", "{}/c/0/0/0"),
        ]
    ]
    assert log == [
        ("fsync", "ledger"),
        *placed,
        ("fsync", "ledger/.draft"),
        ("link", "ledger/shard-000000.json"),
        ("fsync", "ledger"),
    ]


def named(descriptor: int, root: Path) -> str:
    name = os.readlink(f"/proc/self/fd/{descriptor}").removeprefix(f"{root}/")
    return "ledger/.draft" if name.endswith(".tmp") else name


def test_a_prepared_store_is_synced_before_it_gets_its_name(tmp_path, kit, monkeypatch):
    synced, rename = Counter(), os.rename
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.update([named(descriptor, tmp_path)]))

    def checked(source: Path, target: Path) -> None:
        everything = {path.relative_to(tmp_path).as_posix() for path in [source, *source.rglob("*")]}
        assert {*synced} >= everything
        rename(source, target)
        synced.clear()

    monkeypatch.setattr(os, "rename", checked)
    kit.open(tmp_path / "s", kit.spec(), 2)
    assert synced[str(tmp_path)] == 1


@pytest.fixture(scope="module")
def torn(tmp_path_factory) -> Path:
    """A folder with the store `killed`, whose writers were killed, and `raced`, which had three at once."""
    folder = tmp_path_factory.mktemp("torn")
    program = Path(__file__).with_name("kill_writers.py")
    done = subprocess.run([sys.executable, program, folder], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def test_killed_at_random_times_the_store_ends_up_the_same(torn, tmp_path, kit):
    killed = EmbeddingStore.open(torn / "killed")
    assert (killed.row_states == OK).sum() == len(killed.images) == 14
    assert verify(killed).ok
    calm = kit.fill(kit.open(tmp_path / "calm", killed.spec, 14))
    shards = [path.relative_to(calm.path) for path in calm.path.glob(shard_path("*", "*"))]
    assert len(shards) == 16
    assert [(killed.path / shard).read_bytes() for shard in shards] == [
        (calm.path / shard).read_bytes() for shard in shards
    ]
    assert killed.content_hashes.tolist() == calm.content_hashes.tolist()


def test_writers_race_without_harm(torn):
    """The race begins at the first prepare; every shard is committed once."""
    report = verify(torn / "raced")
    assert (report.damage, report.orphans, report.leftovers) == ([], [], [])
    assert report.rows_ok == 14
    assert sorted(os.listdir(torn)) == ["killed", "raced"]
