"""benchmarks/read.py, read_cold.py and opening.py in miniature."""

import os
import pickle
import sys
from importlib.metadata import version

import numpy as np
import pytest

from sam_cache.store import OK, EmbeddingStore, verify


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


BATCHES = [[4, 0, 3], [1, 5, 2]]


@pytest.mark.parametrize("codec", ["raw", "blosc"])
def test_what_reads_rows_reads_what_was_written_and_the_figures_become_tables(program, tmp_path, monkeypatch, codec):
    benchmark = program("read")
    monkeypatch.setattr(benchmark, "time_streams", lambda *arguments: ({}, {}))  # worker processes take long to start
    data = program("read_contenders").make_data(tmp_path, 6, 1, codec)
    result = benchmark.measure(data, BATCHES, 1, [sys.executable])
    newest = "zarr_python_" + "_".join(version("zarr").split(".")[:2])
    assert {"memcpy", "verified", "unverified", "zarr_python", "zarr_python_into", newest} < {*result["rates"]}
    assert result["other_pythons"][newest]["python"] == sys.version.split()[0]
    measured = {name for name, ratio in result["ratios"].items() if ratio is not None}
    assert {"verified_vs_memcpy", "unverified_vs_memcpy_2", "vs_zarr_python", "vs_tensorstore"} < measured
    assert ("vs_npy" in measured) == (codec == "raw")
    assert result["not_measured"]["masks_vs_ring"] == "not part of this run"
    text = benchmark.render(result | {"settings": {"codec": codec}})
    assert "| **samcache, verified** |" in text
    assert ("| `delivered_vs_dataloader_npy` | 5 | not measured |" in text) == (codec == "raw")


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools under NumPy 2
def test_masks_as_one_writes_them_are_the_masks_that_we_deliver(program, tmp_path):
    data = program("read_contenders").make_data(tmp_path, 3, 1, "raw")
    streams = program("read_streams")
    # As a DataLoader's workers get them.
    usual, ours = pickle.loads(pickle.dumps((streams.MasksAsUsual(data.store), streams.OurMasks(data))))
    rows = streams.NpyRows(program("read_formats").npy_files(data))
    for annotate, collate in (usual, streams.collate_as_usual), (ours, streams.collate_ours):
        items = streams.RowsWithMasks(rows, annotate)
        together = collate([items[row] for row in (2, 0)])
        np.testing.assert_array_equal(together[0], data.values[[2, 0]])
    assert len(together[1].targets.masks) == sum(len(usual(row)[1]) for row in (2, 0))
    for row in range(3):
        (boxes, masks), annotation = usual(row), ours(row)
        assert len(masks) == len(boxes) == len(annotation.prompts)
        # OpenCV rounds the shrunk image to whole cells.
        assert abs(masks - annotation.targets.masks).sum() < 0.05 * masks.sum()
        # Ours are moved by up to 20 pixels, as SAM was trained.
        np.testing.assert_allclose(boxes, annotation.prompts.boxes_xyxy_input, atol=20)


def test_cold_reading_in_miniature(program, tmp_path):
    benchmark = program("read_cold")
    data = program("read_contenders").make_data(tmp_path, 9, 1, "raw")
    result = benchmark.measure(data, [[row] for row in range(9)], 1)
    assert {"verified", "unverified", "ring", "npy", "zarr_python"} < {*result["rates"]}
    assert all(rate["cpu_ms"] >= 0 for rate in result["rates"].values())
    assert "| **ours**, verified |" in benchmark.render(result)


@pytest.mark.parametrize("compact", [True, False])
def test_a_simulated_store_is_a_whole_one(program, tmp_path, compact):
    benchmark = program("opening")
    benchmark.simulate(tmp_path / "s", 150, compact)
    store = EmbeddingStore.open(tmp_path / "s")
    assert (store.row_states == OK).all()
    assert len(store.images) == len(store.objects()["row"]) == 150
    assert len({*store.content_hashes.tolist()}) == 150
    assert verify(store).ok
    found = benchmark.open_once(store.path)
    assert found["open_s"] < found["first_batch_s"]
    row = {"rows": 150, **found}
    million = {**row, "rows": 1_000_000}
    result = {"compact": [row, million], "single": [row]}
    assert "1,000,000 rows: opened in" in benchmark.render(result)
    assert benchmark.draw(result).axes
