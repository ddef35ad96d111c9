"""Which of the held-out images the evaluations in training look at."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sam_cache.stages import training
from sam_cache.stages.training import spread
from sam_cache.store import EmbeddingStore


@pytest.mark.parametrize(("count", "kept"), [(1, [3]), (2, [3, 12]), (3, [3, 7, 12]), (4, [3, 6, 9, 12])])
def test_rows_are_taken_from_all_over(count, kept):
    assert spread(np.arange(3, 13), count).tolist() == kept


def test_all_rows_are_taken_where_there_are_no_more():
    rows = np.array([5, 9, 2])
    assert spread(rows, 3).tolist() == spread(rows, 64).tolist() == [5, 9, 2]
    assert spread(rows[:0], 64).tolist() == []


@given(st.integers(1, 5000), st.integers(1, 300))
def test_rows_are_distinct_and_evenly_spaced(length, count):
    taken = spread(np.arange(length), count)
    assert len(taken) == min(count, length)
    gaps = np.diff(taken)
    assert (gaps > 0).all()
    assert len(gaps) == 0 or (gaps.max() - gaps.min() <= 1 and taken[-1] == length - 1)


def test_an_evaluation_in_training_looks_at_the_first_and_the_last_image(samcache, scenes, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(training, "log_images", lambda accelerator, step, drawn: seen.extend(drawn))
    assert samcache("train-top", "--store", scenes, "--out", "run", "--steps", 1, "--warmup", 0, "--prompts", "box",
                    "--held-out", 0.6, "--evaluate-images", 2, "--pictures", 2) == 0  # fmt: skip
    held_out = json.loads((tmp_path / "run" / "record.json").read_text())["held_out"]
    images = EmbeddingStore.open(scenes).images
    names = [f"{image_id} {path}" for image_id, path in zip(images.ids, images.paths, strict=True)]
    rows = [int(images.rows[names.index(name)]) for name in held_out]
    assert len(rows) > 3
    assert seen == [f"held_out/row{row:06d}" for row in (rows[0], rows[-1])]
