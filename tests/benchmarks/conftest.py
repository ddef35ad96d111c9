"""Programs of benchmarks/, imported by name as they import one another."""

import importlib
from pathlib import Path

import pytest


@pytest.fixture
def program(monkeypatch):
    """`program("read")` is the module benchmarks/read.py."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module
