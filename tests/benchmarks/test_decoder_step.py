"""benchmarks/decoder_step.py in miniature."""

import argparse

import pytest

STEP = {"images": 2, "prompts": 2, "points": 16, "chunk": 2, "rounds": 1, "model": "tiny", "device": "cpu"}


@pytest.fixture(scope="module")
def measured():
    return {}


@pytest.fixture
def result(program, measured):
    """Of one measurement for all tests."""
    return measured.setdefault("result", program("decoder_step").measure(argparse.Namespace(**STEP)))


def test_ratios_are_those_the_issue_names(result):
    assert {"maps_vs_upstream", "points_vs_upstream", "memory_maps", "memory_points"} <= result["ratios"].keys()
    assert {"box_maps_vs_upstream", "mask_points_vs_upstream"} <= result["ratios"].keys()
    kept = result["kinds"]["point"]["kept_mib"]
    assert result["ratios"]["memory_maps"] == pytest.approx(kept["maps"] / kept["upstream"])


def test_less_is_kept_than_upstream_keeps_and_least_for_few_cells(result):
    for kind, found in result["kinds"].items():
        kept = found["kept_mib"]
        assert 0 < kept["points"] < kept["maps"] < kept["upstream"], kind
    assert kept["maps"] > result["kinds"]["box"]["kept_mib"]["maps"]  # a mask of one's own takes an image of one's own


def test_masks_and_gradients_are_upstreams(result):
    for found in result["kinds"].values():
        assert 0 < found["differences"]["masks"] < 1e-5
        assert 0 < found["differences"]["gradients"] < 1e-5


def test_render_has_a_line_for_every_contender(program, result):
    text = program("decoder_step").render(result)
    for name in ("upstream", "upstream, a backward per image", "ours, 16 cells of each map"):
        assert f"| {name} |" in text
    assert text.count("\n| ") == 2 + 5 + 3 + 3
    assert "the targets were 1.5x with 0.55 and 3x with 0.3" in text


def test_render_of_a_gpu(program, result):
    text = program("decoder_step").render(result | {"step": result["step"] | {"device": "cuda"}})
    assert "bf16" in text
    assert "the target was 5x" in text
