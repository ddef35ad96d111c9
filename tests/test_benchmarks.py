"""The programs of benchmarks/ still start, and the contenders of the headline figure still run."""

import argparse
import importlib
from pathlib import Path

import pytest
import torch

from sam_cache.stages.cached_data import CachedData

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def program(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)  # they import one another by name, as scripts do
    return importlib.import_module


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_every_program_imports(program, name):
    program(name)


def test_all_contenders_of_the_headline_figure_run(program, tmp_path):
    benchmark = program("cached_vs_end_to_end")
    arguments = argparse.Namespace(model="tiny", images=2, prompts=2, device="cpu")
    checkpoint, cfg = benchmark.make_store(arguments, tmp_path)
    data = CachedData.open(cfg.store, annotations=None, partial=False, held_out=0, seed=0)
    contenders, flops = benchmark.make_contenders(arguments, data, cfg, checkpoint, torch.device("cpu"))
    for take_step in contenders.values():
        take_step()
    assert flops["encoder"] > 0
    assert flops["step"] > 0
