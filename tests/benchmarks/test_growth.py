"""benchmarks/growth.py in miniature."""

import os

import pytest


@pytest.fixture
def growth(program):
    return program("growth")


def test_a_step_is_measured_whatever_the_chunks(growth):
    found = growth.measure_step("tiny", images=2, objects=3, loss="points", budget=4, rounds=1, device="cpu")
    assert found["seconds"] > 0
    assert (found["images"], found["objects"], found["loss"]) == (2, 3, "points")


def test_prompts_and_targets_are_made_of_as_many_objects_as_asked_for(growth):
    found = growth.measure_annotation(30, rounds=1)
    assert found["objects"] == 30
    assert found["seconds"] > 0


def test_workers_deliver(growth, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    found = growth.measure_workers(2, rows=8, rounds=1)
    assert found["threads"] == 2
    assert found["rows_per_s"] > 0


def test_columns_are_repeated_whatever_they_hold(growth):
    from sam_cache.store.columns import Ragged

    assert list(growth.repeat(Ragged.from_list([b"a", b"bc"]), 3)) == [b"a", b"bc", b"a"]


def test_render_has_a_line_for_every_point(growth):
    def point(**axes):
        return {"seconds": 0.5, "bytes": 2**20} | axes

    result = {
        "objects": [point(images=1, objects=count, loss=loss) for count in (1, 700) for loss in growth.LOSSES],
        "images": [point(images=count, objects=8, loss=loss) for count in (1, 2) for loss in growth.LOSSES],
        "annotation": [point(objects=count) for count in (1, 700)],
        "workers": [{"threads": 1, "first_epoch_rows_per_s": 10.0, "rows_per_s": 20.0}],
        "settings": {"objects": [1, 700], "images": [1, 2], "mask_budget": 16, "prompts": 8},
    }
    text = growth.render(result)
    assert "| 700 | 500 ms | 1 MiB |" in text
    assert "| 1 | 10 | 20 |" in text
    assert len(growth.draw(result).axes) == 2
