"""benchmarks/codec_table.py in miniature."""

import argparse
import os

import pytest

from sam_cache.stages import calibrate, calibration, training

NAMES = ("fp32", "fp16", "bf16", "int8", "fp16 keep 7", "fp16 keep 5", "fp16 keep 3")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Neither waiting for the disk nor drawing the curves of so many short runs."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(training, "draw_curves", lambda metrics, path: None)


def losses(within: bool) -> dict:
    return {name: {"iou_loss": 0.001, "boundary_iou_loss": -0.002, "within_noise": within} for name in NAMES}


@pytest.fixture
def result(program, tmp_path) -> dict:
    """Real rows of tiny's, and losses as if they had been measured."""
    benchmark = program("codec_table")
    options = {"seeds": 3, "steps": 60}
    of_set = {"set": "scenes", "images": 5, "iou": 0.7, "boundary_iou": 0.6, "losses": losses(True)}
    of_set["seed_noise"] = {"iou": 0.002, "boundary_iou": 0.003}
    return {"rows": benchmark.measure_rows("tiny", 3, 1, tmp_path), "sets": [of_set], "settings": options}


def test_every_type_and_codec_is_measured_and_told(program, result):
    benchmark = program("codec_table")
    codecs = result["rows"]["codecs"]
    assert codecs.keys() == {f"{name} {codec}" for name in NAMES for codec in benchmark.CODECS}
    assert result["rows"]["shape"] == [32, 8, 8]
    for row in codecs.values():
        assert row["times_smaller"] == pytest.approx(4 * 32 * 8 * 8 / row["bytes_per_row"])
        assert min(row["write_mb_per_s"], row["read_mb_per_s"]) > 0
    text = benchmark.render(result)
    assert "| fp16 keep 5 | blosc |" in text
    assert "| noise of the seeds | 0.0020 | 0.0030 |" in text
    assert "| int8 | +0.0010 | -0.0020 |" in text
    assert "is not met" in text  # rows this small are mostly gaps between pages
    figure = benchmark.draw(result)
    assert [(len(axes.collections), len(axes.patches)) for axes in figure.axes] == [(3, 0), (1, 1)]


def test_the_goal_is_met_by_what_is_small_and_loses_nothing_on_any_set(program, result):
    benchmark = program("codec_table")
    result["rows"]["codecs"]["int8 zstd"]["times_smaller"] = 4.2
    result["rows"]["codecs"]["fp16 blosc"]["times_smaller"] = 3.9
    assert benchmark.met(result) == ["int8 zstd"]
    assert "is met by int8 zstd; the smallest of these is 4.2x smaller" in benchmark.render(result)
    result["sets"].append(result["sets"][0] | {"losses": losses(True) | {"int8": {"within_noise": False}}})
    assert benchmark.met(result) == []


def test_a_set_is_calibrated_and_its_losses_are_told(program, tmp_path, monkeypatch):
    benchmark = program("codec_table")
    for module in (calibrate, calibration):
        monkeypatch.setattr(module, "CANDIDATES", benchmark.CANDIDATES[:4:3])
    options = argparse.Namespace(model="tiny", steps=1, seeds=2, input_size=None)
    found = benchmark.measure_losses("scenes", {"scenes": 4, **benchmark.SCENES}, options, tmp_path / "c")
    assert found["losses"].keys() == {"fp32", "int8"}
    assert found["losses"]["fp32"]["iou_loss"] == 0
    assert len(found["scores"]) == 2 * 2
    assert found["images"] >= 1


def test_a_set_that_is_not_there_is_named(program, tmp_path):
    known, missing = program("codec_table").sets(tmp_path, 7)
    assert known == {"generated scenes": {"dataset": "synthetic", "scene_seed": 5, "scenes": 7}}
    assert missing == {"fruits_nuts": f"no folder {tmp_path / 'fruits_nuts'}"}
