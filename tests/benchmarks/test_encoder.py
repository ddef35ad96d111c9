"""The encoder's benchmark in miniature, and what it says of a result of either device."""

import pytest


@pytest.fixture
def benchmark(program):
    return program("encoder")


def result_of(device, *cases):
    return {"device": device, "cases": list(cases), "product_gflop_per_s": {"F.linear": 1000.0}, "skipped": ["vit_h"]}


def test_contenders_on_a_cpu_agree(benchmark):
    case = benchmark.measure_on_cpu("tiny", rounds=1)
    assert case["seconds"].keys() == case["distance"].keys() == {"published", "channels", "without_onednn", "ours"}
    assert case["best"] in ("ours", "channels")
    assert case["distance"]["published"] == 0
    assert all(distance < benchmark.BOUNDS["cpu"] for distance in case["distance"].values())
    assert case["ratios"].keys() >= {"ours_vs_published", "ours_vs_without_onednn"}
    text = benchmark.render(result_of("cpu", case))
    assert "| tiny | published |" in text
    assert "- vit_h: not measured" in text
    assert "Ours is within 0.0001" in text


def test_the_share_of_the_machine_is_of_the_published_operations(benchmark):
    assert benchmark.count_gflop("vit_b") == pytest.approx(972, abs=1)
    # 0.5 s an image of 972 GFLOP is 1944 GFLOP/s, of 1000.
    case = benchmark.describe_case("vit_b", {"published": [1.0], "ours": [0.5]}, {"published": 1, "ours": 1},
                                   {"published": 0.0, "ours": 1e-6})  # fmt: skip
    assert "| vit_b | **ours** | 2 | 2.00x | 194% | 1.0e-06 |" in benchmark.render(result_of("cpu", case))


def test_a_result_of_a_gpu_names_targets_and_what_failed(benchmark):
    seconds = {"published": [8.0, 9.0], "fast": [1.0, 1.0], "channels": [6.0, 6.0], "kernel": [4.0, 4.0]}
    images = {"published": 1, "fast": 1, "channels": 8, "kernel": 8}
    case = benchmark.describe_case(
        "vit_b", seconds, images, {"published": 0.0, "fast": 0.1, "channels": 0.01, "kernel": 0.01}
    )
    assert case["best"] == "kernel"
    assert case["ratios"]["ours_vs_published"] == pytest.approx(17)
    case |= {"batch": images, "not_measured": {"autotuned": "RuntimeError: no Triton"}}
    text = benchmark.render(result_of("cuda", case))
    assert "17.00x published (met: 8x)" in text
    assert "2.00x fast (met: 1.3x)" in text
    assert "- vit_b, autotuned: not measured (RuntimeError: no Triton)" in text
    assert "Ours is within 0.03" in text
