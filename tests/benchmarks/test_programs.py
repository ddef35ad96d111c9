"""The programs of benchmarks/ still start."""

import argparse
from pathlib import Path

import pytest
import torch

from sam_cache.batches import Preprocessing, Sampling
from sam_cache.data import parse_prompts
from sam_cache.model import SIZES, freeze, load_sam
from sam_cache.model.parts import is_of_hq_head, outline

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_every_program_imports(program, name):
    program(name)


@pytest.fixture
def two_scenes(program):
    """Two whole scenes that fill tiny's input, their objects asked for by boxes."""
    sampling = Sampling(parse_prompts("box"), seed=0, training=False, max_objects=4)
    how = Preprocessing(SIZES["tiny"].input_size, fit="squash")
    return program("levels").read({"dataset": "synthetic", "count": 2}, sampling, how, SIZES["tiny"].mask_size, 2)


@pytest.fixture
def heads():
    """SAM and HQ-SAM on one encoder, as benchmarks/levels.py trains them."""
    heads = {"sam": load_sam("tiny"), "hq": load_sam("tiny", hq="hq")}
    freeze(heads["sam"], {"prompt", "decoder"})
    freeze(heads["hq"], {"head"})
    return heads


def test_what_each_network_of_the_hq_table_trained_is_counted(program, tmp_path):
    arguments = argparse.Namespace(
        model="tiny", input_size=None, steps=1, early_dtype="int8", seed=0, overlays=tmp_path / "overlays"
    )
    benchmark = program("hq")
    rows = benchmark.measure("scenes", {"dataset": "synthetic", "scenes": 4}, arguments, tmp_path)
    assert [row["what"] for row in rows] == [benchmark.UNTOUCHED, *benchmark.RUNS]
    trained = {row["what"]: row["parameters"] for row in rows}
    sizes = {key: tensor.numel() for key, tensor in outline(SIZES["tiny"], hq=True).state_dict().items()}
    head = sum(count for key, count in sizes.items() if is_of_hq_head(key))
    masks = sum(count for key, count in sizes.items() if "output_hypernetworks" in key)  # not trained with the head
    decoder = sum(count for key, count in sizes.items() if key.startswith("mask_decoder.")) - head
    assert trained[benchmark.UNTOUCHED] == 0
    for name, knobs in benchmark.RUNS.items():
        expected = {("decoder",): decoder, ("head",): head, ("head", "decoder"): head + decoder - masks}[knobs["train"]]
        assert trained[name] == expected, name
    assert decoder > head > 0
    assert len({(row["images"], row["objects"]) for row in rows}) == 1
    assert len({row["iou"] for row in rows}) > 1
    assert all(bool(row["gain"]) == (row["what"] != benchmark.UNTOUCHED) for row in rows)
    assert list((tmp_path / "overlays").glob("scenes-row*.png"))


def test_coarser_storage_is_farther_from_the_live_levels(program, heads, two_scenes):
    benchmark = program("levels")
    rows = {row["stored"]: row for row in benchmark.compare_storage(heads, two_scenes)}
    assert rows.keys() == benchmark.STORED.keys()
    for level in ("neck", "early"):
        assert 0 < rows["fp16"][level] < rows["bf16"][level] < 1e-2
        assert rows["fp16"][level] < rows["int8"][level] < 5e-2
    assert rows["early int8"]["neck"] == rows["fp16"]["neck"]
    assert rows["early int8"]["early"] == rows["int8"]["early"]
    # SAM's decoder does not see the early level.
    assert rows["early int8"]["sam_gradient"] == rows["fp16"]["sam_gradient"]
    assert rows["early int8"]["hq_gradient"] > rows["fp16"]["hq_gradient"]
    for row in rows.values():
        assert 0 < row["sam_gradient"] < 0.1
        assert 0 < row["hq_gradient"] < 0.1
        assert row["sam_loss"] < 1e-2
        assert row["hq_loss"] < 1e-2


def test_a_mirrored_level_is_not_the_mirrored_images(program, heads, two_scenes):
    found = program("levels").compare_flips(heads, two_scenes)
    with torch.no_grad():
        image = heads["hq"].image_encoder(two_scenes.pixels, two_scenes.content_hw)
        mirrored = heads["hq"].image_encoder(two_scenes.pixels.flip(3), two_scenes.content_hw)
    for level in ("neck", "early"):
        difference = image[level].flip(3) - mirrored[level]
        assert found[f"{level}_distance"] == pytest.approx((difference.norm() / mirrored[level].norm()).item())
        assert found[f"{level}_distance"] > 1e-2
        assert found[f"{level}_between_images"] > 1e-2
    assert 0 <= found["iou_of_mirrored_levels"] <= 1
    assert 0 <= found["iou_of_mirrored_image"] <= 1
    assert found["iou_of_mirrored_levels"] != found["iou_of_mirrored_image"]
