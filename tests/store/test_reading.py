"""The reader and the ring: right values, from any thread, in reused memory, or an error."""

import os
import threading
import time

import numpy as np
import pytest
import torch
import zarr

from sam_cache.errors import DamageError, StoreError
from sam_cache.store import EmbeddingStore, Ring
from sam_cache.store import reader as module
from sam_cache.store.layout import shard_path


@pytest.fixture(scope="module")
def store(tmp_path_factory, kit):
    path = tmp_path_factory.mktemp("reading") / "s"
    return kit.fill(kit.open(path, kit.spec(two_levels=True), 22), failing=[6])


@pytest.fixture(scope="module")
def truth(store) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(zarr.open_array(store.path / name, mode="r")[:]) for name in ("neck", "early")}


def test_the_plain_path_equals_preadv(store, truth, monkeypatch):
    rows = [9, 0, 21, 9]
    outs = []
    for hidden in (False, True):
        if hidden:
            monkeypatch.delattr(os, "preadv")
        reader = store.reader(("neck", "early"))
        outs.append(reader.empty(4))
        reader.read(rows, outs[-1])
    for name, tensor in truth.items():
        assert torch.equal(outs[0][name], tensor[rows])
        assert torch.equal(outs[1][name], tensor[rows])


def test_short_reads_are_completed(store, truth, monkeypatch):
    monkeypatch.setattr(os, "preadv", lambda descriptor, buffers, offset, flags=0: 3)
    out = store.reader().empty(2)
    store.reader().read([3, 4], out)
    assert torch.equal(out["neck"], truth["neck"][[3, 4]])


def test_without_checksums_the_same_is_read(store, truth):
    reader, rows = store.reader(("neck", "early"), verify=False), [9, 0, 21, 9]
    out = reader.empty(4)
    reader.read(rows, out)
    for name, tensor in truth.items():
        assert torch.equal(out[name], tensor[rows])


def test_what_is_not_in_memory_is_announced_once_and_ahead(store, truth, monkeypatch):
    """Every row as if it were on the disk: the four after it are asked for before it is waited for."""
    preadv, advise, calls = os.preadv, os.posix_fadvise, []
    rows, stride = [9, 0, 21, 9, 3, 8, 14, 2], 4096

    def read(descriptor, buffers, offset, flags=0):
        if flags == os.RWF_NOWAIT:
            raise BlockingIOError
        calls.append("wait")
        return preadv(descriptor, buffers, offset)

    def watched(descriptor, offset, length, advice):
        calls.append((offset, advice))
        advise(descriptor, offset, length, advice)

    monkeypatch.setattr(os, "preadv", read)
    monkeypatch.setattr(os, "posix_fadvise", watched)
    out = store.reader().empty(8)
    store.reader().read(rows, out)
    assert torch.equal(out["neck"], truth["neck"][rows])
    asked = [(row % 4 * stride, os.POSIX_FADV_WILLNEED) for row in rows]
    assert calls == [*asked[1:5], "wait", asked[5], "wait", asked[6], "wait", asked[7], "wait", *["wait"] * 4]


def test_what_is_in_memory_is_not_announced(store, monkeypatch):
    reader = store.reader()
    out = reader.empty(4)
    reader.read([9, 0, 21, 9], out)
    with open(store.path / shard_path("neck", 0), "rb") as file:
        try:
            os.preadv(file.fileno(), [bytearray(9)], 0, os.RWF_NOWAIT)
        except OSError:
            pytest.skip("this file system cannot say what is in memory")
    monkeypatch.setattr(os, "posix_fadvise", None)
    reader.read([9, 0, 21, 9], out)


def test_few_files_stay_open(store, truth, monkeypatch):
    monkeypatch.setattr(module, "OPEN_FILES", 2)
    before = set(os.listdir("/proc/self/fd"))
    reader = store.reader()
    out = reader.empty(21)
    rows = [row for row in range(22) if row != 6]
    reader.read(rows, out)
    assert torch.equal(out["neck"], truth["neck"][rows])
    assert len(set(os.listdir("/proc/self/fd")) - before) <= 2
    del reader
    assert set(os.listdir("/proc/self/fd")) <= before


def test_rows_that_are_not_ok_are_refused_with_the_reason(tmp_path, kit):
    store = kit.open(tmp_path / "s", kit.spec(), 3)
    store.set_objects("x", {}, {})
    with store.writing(store.shards()[0]) as writer:
        for row in (0, 2):
            writer.append(row, kit.values(row, store.spec), "")
        writer.fail(1, "truncated JPEG")
    store = kit.open(tmp_path / "s", kit.spec(), 6)
    reader = store.reader()
    for row, reason in [
        (1, "row 1 cannot be read: truncated JPEG"),
        (3, "row 3 cannot be read: a hole"),
        (4, "row 4 cannot be read: not committed yet"),
        (99, "row 99 cannot be read: beyond the last row"),
        (-1, "row -1 cannot be read: beyond"),
    ]:
        with pytest.raises(StoreError, match=reason):
            reader.read(np.array([0, row]), reader.empty(2))
    with pytest.raises(StoreError, match="no level early, only neck; embed into another .* --levels neck,early$"):
        store.reader(("neck", "early"))


def test_memory_that_is_not_contiguous_is_refused(store):
    reader = store.reader()
    out = {"neck": reader.empty(8)["neck"][::2]}
    with pytest.raises(RuntimeError, match="view"):
        reader.read([0, 1, 2, 3], out)


def test_a_reader_sees_shards_committed_through_its_store(tmp_path, kit):
    store = kit.open(tmp_path / "s", kit.spec(), 4)
    reader = store.reader()
    kit.fill(store)
    reader.read([0], reader.empty(1))


@pytest.mark.parametrize("codec", ["raw", "zstd", "blosc"])
def test_no_flipped_bit_is_ever_returned(tmp_path, kit, codec):
    """Every byte of a row, some of the gaps and the index: an error, or there the same values."""
    store = kit.fill(kit.open(tmp_path / "s", kit.spec(codec=codec), 4))
    reader = store.reader()
    right, out = reader.empty(4), reader.empty(4)
    reader.read(range(4), right)
    extents = store._index.extents["neck"]
    path = store.path / shard_path("neck", 0)
    data = path.read_bytes()
    bits = np.random.default_rng(0).integers(0, 8, len(data))
    damaged = 0
    with open(path, "r+b", buffering=0) as file:
        rows = [position for offset, length, _ in extents.tolist() for position in range(offset, offset + length)]
        for position in {*rows, *range(0, len(data), 16)}:
            os.pwrite(file.fileno(), bytes([data[position] ^ (1 << bits[position])]), position)
            for row, (offset, length, _) in enumerate(extents.tolist()):
                inside = offset <= position < offset + length
                if inside:
                    damaged += 1
                    with pytest.raises(DamageError, match=f"row {row} of level neck in neck/c/0/0/0/0 is damaged"):
                        reader.read([row], out)
                elif row == position % 4:
                    reader.read([row], out)
                    assert torch.equal(out["neck"][0], right["neck"][row])
            os.pwrite(file.fileno(), data[position : position + 1], position)
    assert damaged == extents["length"].sum()


def test_truncated_missing_and_swapped_files_are_damage(tmp_path, kit):
    store = kit.fill(kit.open(tmp_path / "s", kit.spec(), 12))
    paths = [store.path / shard_path("neck", index) for index in range(3)]
    os.truncate(paths[0], 4096 * 2 + 100)
    paths[1].unlink()
    paths[2].write_bytes((tmp_path / "s/neck/c/2/0/0/0").read_bytes()[4096:] + bytes(4096))  # whole rows, but others
    out = store.reader().empty(1)
    store.reader().read([1], out)
    for row, what in [(2, "cut off: its file is too short"), (4, "gone: its file is missing")]:
        with pytest.raises(DamageError, match=f"row {row} of level neck .* is {what}"):
            store.reader(verify=False).read([row], out)
    for row, what in [(2, "cut off: its file is too short"), (4, "gone: its file is missing"), (8, "damaged")]:
        with pytest.raises(DamageError, match=f"row {row} of level neck .* is {what}.*verify --store .* --repair"):
            store.reader().read([row], out)


BATCHES = [[0, 1, 2], [3], [21, 20, 19, 18, 17], [], [5, 5], [7, 8], [9], [10, 11], [12]]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("depth", "keep"), [(1, 1), (4, 1), (4, 2), (3, 3)])
def test_the_ring_yields_batches_in_order_and_keeps_them_as_long_as_promised(store, truth, threads, depth, keep):
    held, pointers = [], set()
    for number, batch in enumerate(Ring(store.reader(("neck", "early")), BATCHES, depth, threads, keep)):
        held = [*held, (BATCHES[number], batch)][-keep:]
        for rows, tensors in held:
            for name, tensor in tensors.items():
                assert tensor.shape[0] == len(rows)
                assert torch.equal(tensor, truth[name][rows])
        if number > 5:  # every buffer has grown to its length by then or is replaced at most once more
            pointers.add(batch["neck"].data_ptr())
    assert number == len(BATCHES) - 1
    assert len(pointers) <= depth


def test_the_ring_reuses_its_memory(store):
    pointers = {batch["neck"].data_ptr() for batch in Ring(store.reader(), [[row] for row in range(6)] * 5, depth=3)}
    assert len(pointers) == 3


def test_the_ring_reads_ahead_but_no_further_than_its_depth(store):
    taken = []

    def batches():
        for row in [0, 1, 2, 3, 4, 5, 7, 8, 9]:
            taken.append(row)
            yield [row]

    for number, _ in enumerate(Ring(store.reader(), batches(), depth=3)):
        assert len(taken) == min(number + 3, 9)


def ring_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("ring")]


def test_closing_early_leaves_no_thread(store):
    iterator = iter(Ring(store.reader(), [[row] for row in range(6)] * 100))
    next(iterator)
    assert ring_threads()
    iterator.close()
    assert not ring_threads()
    for _ in Ring(store.reader(), [[0]] * 100):
        break
    assert not ring_threads()


def test_errors_surface_where_their_batch_was_due(store):
    iterator = iter(Ring(store.reader(), [[4], [5], [6], [7], [8]]))
    next(iterator), next(iterator)
    with pytest.raises(StoreError, match="row 6 cannot be read: truncated JPEG"):
        next(iterator)
    assert not ring_threads()

    def broken():
        yield [0]
        raise RuntimeError("the sampler broke")

    with pytest.raises(RuntimeError, match="the sampler broke"):
        list(Ring(store.reader(), broken()))
    assert not ring_threads()
    with pytest.raises(ValueError, match="keep=5"):
        Ring(store.reader(), [], depth=4, keep=5)


def test_threads_share_a_reader(store, truth):
    """More threads than open files, so that files leave the cache while they are read."""
    reader = EmbeddingStore.open(store.path).reader()
    wrong = []

    def work(seed: int):
        draw = np.random.default_rng(seed)
        out = reader.empty(4)
        for _ in range(60):
            rows = draw.choice([row for row in range(22) if row != 6], 4)
            reader.read(rows, out)
            if not torch.equal(out["neck"], truth["neck"][rows]):
                wrong.append(rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "OPEN_FILES", 1)
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_slow_reader_does_not_mix_batches(store, truth, monkeypatch):
    """Buffers are not handed out again before their reading has ended."""
    fill = module._OpenFile.fill_from_memory

    def slow(self, buffers, offset, size):
        time.sleep(0.002 * (offset % 3 == 0))
        return fill(self, buffers, offset, size)

    monkeypatch.setattr(module._OpenFile, "fill_from_memory", slow)
    rows = [row for row in range(22) if row != 6]
    for row, batch in zip(rows, Ring(store.reader(), [[row] for row in rows], depth=2, threads=2), strict=True):
        assert torch.equal(batch["neck"][0], truth["neck"][row])
