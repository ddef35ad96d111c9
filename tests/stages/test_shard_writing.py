"""Rows are written in a thread of their own: errors, stops and the ends of shards are as if they were not."""

import importlib
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from sam_cache.batches import Preprocessing, pixel_batches
from sam_cache.config import EmbedConfig
from sam_cache.data.synthetic import open_synthetic
from sam_cache.errors import Interrupted, UsageError
from sam_cache.model import load_encoder
from sam_cache.model.attention import run_block
from sam_cache.stages.embed import embed, threads_beside
from sam_cache.stages.encoding import Encoding, compile_encoder, wants_compiling
from sam_cache.stages.progress import Stop
from sam_cache.stages.shard_writing import WritingThread
from sam_cache.store import OK, EmbeddingStore, ShardWriter, verify

SCENES = 11
CPU = torch.device("cpu")
module = importlib.import_module("sam_cache.stages.embed")


def config(store: Path, **knobs) -> EmbedConfig:
    given = {"dataset": "synthetic", "scenes": SCENES, "model": "tiny", "shard_rows": 4, "threads": 2}
    return EmbedConfig(store=store, **given | knobs)


def bytes_of(store: Path) -> dict[str, bytes]:
    return {path.parts[-4]: path.read_bytes() for path in store.glob("neck/c/*/0/0/0")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    store = tmp_path_factory.mktemp("whole") / "s.zarr"
    assert embed(config(store)) == 0
    return store


def test_pieces_are_done_in_order_and_the_giver_waits():
    done, gate, given = [], threading.Event(), []
    with WritingThread(ahead=2) as writing:
        writing.give(gate.wait)

        def give() -> None:
            for number in range(5):
                writing.give(lambda number=number: done.append(number))
                given.append(number)

        giver = threading.Thread(target=give)
        giver.start()
        giver.join(0.2)
        assert giver.is_alive()
        assert given == [0]
        gate.set()
        giver.join()
        writing.finish()
    assert done == [0, 1, 2, 3, 4]


def test_without_a_thread_the_giver_does_it_itself():
    done = []
    with WritingThread(ahead=0) as writing:
        writing.give(lambda: done.append(threading.current_thread()))
        assert done == [threading.current_thread()]


@pytest.mark.parametrize("end", ["give", "finish"])
def test_a_piece_that_fails_is_the_last_and_says_so(end):
    done = []

    def fail():
        raise OSError("no space left")

    def write():
        with WritingThread(ahead=3) as writing:
            writing.give(lambda: done.append(0))
            writing.give(fail)
            writing.give(lambda: done.append(1))
            while end == "give":
                writing.give(lambda: done.append(2))
            writing.finish()

    with pytest.raises(OSError, match="no space left"):
        write()
    assert done == [0]


def test_in_turn_as_side_by_side(whole, tmp_path):
    assert threads_beside(CPU) == 0 < threads_beside(torch.device("cuda"))
    assert embed(config(tmp_path / "s.zarr", threads=None, device="cpu")) == 0
    assert bytes_of(tmp_path / "s.zarr") == bytes_of(whole)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batches_reach_over_the_ends_of_shards(whole, tmp_path, batch_size, relative_rows):
    assert embed(config(tmp_path / "s.zarr", batch_size=batch_size)) == 0
    assert verify(tmp_path / "s.zarr").ok
    assert relative_rows(tmp_path / "s.zarr", whole) < 2e-3  # rounded to fp16 after sums of another order
    if batch_size == 1:
        assert bytes_of(tmp_path / "s.zarr") == bytes_of(whole)


@pytest.fixture
def relative_rows():
    def relative_rows(first: Path, second: Path) -> float:
        found = []
        for path in (first, second):
            store = EmbeddingStore.open(path)
            rows = store.images.rows.tolist()
            assert (store.row_states[rows] == OK).all()
            reader = store.reader()
            out = reader.empty(len(rows))
            reader.read(rows, out)
            found.append(out["neck"].float())
        return ((found[0] - found[1]).abs().max() / found[1].std()).item()

    return relative_rows


@pytest.mark.parametrize("at", [0, 3, 6])
def test_an_error_of_the_writer_ends_the_command_and_the_next_goes_on(whole, tmp_path, monkeypatch, at):
    append, rows = ShardWriter.append, []

    def append_or_fail(writer, row, *rest):
        if len(rows) == at:
            raise OSError("no space left on device")
        rows.append(row)
        return append(writer, row, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "append", append_or_fail)
        with pytest.raises(OSError, match="no space left"):
            embed(config(tmp_path / "s.zarr"))
    assert rows == list(range(at))
    store = EmbeddingStore.open(tmp_path / "s.zarr")
    assert len(store.uncommitted()) == 3 - at // 4
    monkeypatch.setattr(ShardWriter, "append", lambda *arguments: rows.append(arguments[1]) or append(*arguments))
    assert embed(config(tmp_path / "s.zarr")) == 0
    assert rows == list(range(SCENES))
    assert bytes_of(tmp_path / "s.zarr") == bytes_of(whole)


def test_what_is_encoded_is_kept_when_asked_to_stop(whole, tmp_path, monkeypatch):
    encoded, encode = [], Encoding.encode

    def encode_and_count(encoding, batch):
        encoded.extend(batch.rows)
        return encode(encoding, batch)

    class Stopping(Stop):
        requested = property(lambda self: len(encoded) >= 6)

    monkeypatch.setattr(Encoding, "encode", encode_and_count)
    with monkeypatch.context() as patch:
        patch.setattr(module, "stop_on_signals", lambda: nullcontext(Stopping()))
        with pytest.raises(Interrupted):
            embed(config(tmp_path / "s.zarr"))
    assert encoded == list(range(6))
    assert embed(config(tmp_path / "s.zarr")) == 0
    assert encoded == list(range(SCENES))
    assert bytes_of(tmp_path / "s.zarr") == bytes_of(whole)


def test_only_a_gpu_compiles():
    assert not wants_compiling(None, CPU, 10**6)
    assert not wants_compiling(False, torch.device("cuda"), 10**6)
    assert wants_compiling(True, torch.device("cuda"), 1)
    assert wants_compiling(None, torch.device("cuda"), 4000)
    assert not wants_compiling(None, torch.device("cuda"), 3999)
    with pytest.raises(UsageError, match="--compile: there is nothing to gain from it on cpu"):
        wants_compiling(True, CPU, 10**6)


def test_an_encoder_that_does_not_compile_runs_as_it_is(monkeypatch, capsys):
    encoder, tried = load_encoder("tiny"), []

    def compile_blocks(places="kernel", **options):
        def broken(block, tokens):
            tried.append((places, len(tokens)))
            raise RuntimeError("no kernel\nfor this machine")

        encoder.compiled = broken

    monkeypatch.setattr(encoder, "compile_blocks", compile_blocks)
    compile_encoder(encoder, 3, CPU)
    assert tried == [("kernel", 3), ("channels", 3)]
    assert encoder.compiled is None
    assert capsys.readouterr().err == "the encoder could not be compiled and runs as it is: no kernel\n"


def test_a_compiled_encoder_sees_batches_of_one_size():
    (pixel_batch,) = pixel_batches(
        open_synthetic(3), [(number, number) for number in range(3)], Preprocessing(128), 5, 1
    )
    encoder, sizes = load_encoder("tiny"), []
    expected = encoder(pixel_batch.pixels, pixel_batch.content_hw)["neck"]
    encoder.compiled = lambda block, tokens: sizes.append(len(tokens)) or run_block(block, tokens)
    levels = Encoding(encoder, CPU, 5, set()).encode(pixel_batch).levels
    assert set(sizes) == {5}
    assert levels["neck"].is_contiguous()
    assert torch.equal(levels["neck"], expected)
