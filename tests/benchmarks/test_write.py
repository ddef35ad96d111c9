"""benchmarks/write.py in miniature."""

import os

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "sync", lambda: None)


def test_every_writer_writes_what_it_is_given_and_the_figures_become_a_table(program, tmp_path):
    benchmark = program("write")
    shards = [np.random.default_rng(seed).standard_normal((3, 2, 64, 64)).astype(np.float16) for seed in range(2)]
    result = benchmark.measure(shards, 1, tmp_path, lambda name, *arguments: 2.0)
    assert result["not_measured"] == {}
    assert {"vs_tensorstore", "vs_zarr_python", "vs_npy", "synced_vs_npy"} < {*result["ratios"]}
    assert all(ratio is not None for ratio in result["ratios"].values())
    assert result["ratios"]["extra_memory_mib"] == 2.0
    assert {"fsync_cost", "crc32c_cost"} < {*result["ratios"]}
    assert all(milliseconds >= 0 for milliseconds in result["pieces"].values())
    text = benchmark.render(result)
    for name in benchmark.NAMES.values():
        assert f"| {name} |" in text


def test_a_contender_that_is_not_installed_is_named_and_left_out(program, tmp_path, monkeypatch):
    benchmark = program("write")

    def missing(*arguments):
        raise ImportError("no such library")

    few = {name: benchmark.CONTENDERS[name] for name in ("ours",)}
    monkeypatch.setattr(benchmark, "CONTENDERS", few | {"tensorstore": missing})
    result = benchmark.measure([np.ones((2, 1, 64, 64), np.float16)], 1, tmp_path, lambda name, *arguments: 2.0)
    assert result["not_measured"] == {"tensorstore": "ImportError: no such library"}
    assert result["ratios"]["vs_tensorstore"] is None
    assert "| TensorStore | not measured | not measured |" in benchmark.render(result)
