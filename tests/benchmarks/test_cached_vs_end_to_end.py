"""benchmarks/cached_vs_end_to_end.py in miniature."""

import argparse

import pytest

SETTINGS = {
    "models": ["tiny"], "prompts": [1, 3], "images": 2, "steps": 2, "rows": 3, "rounds": 1, "loader_rounds": 1,
    "store_model": "tiny", "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def measured():
    return {}


@pytest.fixture
def result(program, measured):
    """Of one measurement for all tests."""
    if not measured:
        measured["result"] = program("cached_vs_end_to_end").measure(argparse.Namespace(**SETTINGS))
    return measured["result"]


def test_all_contenders_of_the_headline_figure_run(result):
    assert [(row["model"], row["prompts"], row["loss"]) for row in result["rows"]] == [
        ("tiny", count, loss) for count in (1, 3) for loss in ("maps", "points")
    ]
    assert all(seconds["median_s"] > 0 for seconds in result["seconds"].values())


def test_operations_grow_with_prompts_and_shrink_with_cells(result):
    flops = result["gigaflops_per_image"]
    assert 0 < flops["step 1 maps"] < flops["step 3 maps"]
    assert all(row["bound"] > 1 for row in result["rows"])


def test_operations_of_a_step_are_nearly_those_that_it_runs(program, tmp_path):
    """Three times its forward: no backward is left out, and nothing is counted that is only made again."""
    made = program("end_to_end_contenders")
    contenders = made.Contenders(tmp_path, argparse.Namespace(**SETTINGS))
    of_turn = made.count_gigaflops(contenders.turns["memory 3 points"])
    ran = of_turn / contenders.steps["memory 3 points"] / SETTINGS["images"]
    assert 0.8 < contenders.gigaflops["step 3 points"] / ran < 1.1


def test_a_step_end_to_end_is_the_encoder_and_the_step(program):
    """By hand, of seconds made up."""
    benchmark = program("cached_vs_end_to_end")
    options = argparse.Namespace(**SETTINGS | {"prompts": [1]})
    seconds = {"encoder tiny": [6.0, 8.0], "upstream encoder tiny": [9.0, 9.0], "upstream 1": [3.0, 3.0]}
    for loss in ("maps", "points"):
        seconds |= {f"memory 1 {loss}": [1.0, 1.0], f"cached 1 {loss}": [1.0, 2.0]}
    alone = {name: [1.0, 1.0] if "memory" in name else [1.0, 1.5] for name in seconds}
    flops = {"encoder tiny": 30.0, "step 1 maps": 10.0, "step 1 points": 5.0}
    maps, points = benchmark.compare(seconds, alone, flops, options)
    assert maps["end_to_end_s"] == 8.0
    assert maps["cached_vs_end_to_end"] == pytest.approx((7 / 1 + 9 / 2) / 2)
    assert maps["cached_vs_upstream"] == pytest.approx((12 + 6) / 2)
    assert maps["cached_vs_memory"] == pytest.approx(1.25)
    assert (maps["bound"], points["bound"]) == (4.0, 7.0)
    assert maps["share_of_bound"] == pytest.approx(maps["cached_vs_end_to_end"] / 4)
    assert maps["share_with_published_encoder"] == pytest.approx((10 / 1 + 10 / 2) / 2 / 4)


def test_render_and_draw(program, result):
    benchmark = program("cached_vs_end_to_end")
    rows = [row | {"prompts": 8} if row["prompts"] == 3 else row for row in result["rows"]]
    text = benchmark.render(result | {"rows": rows})
    assert text.count("| tiny |") == 4
    assert "the target was 45%" in text
    assert "the target was 60%" in text
    assert len(benchmark.draw(result).axes) == 2
