"""The packaged model: small, described, and of some use without any tuning."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

PACKAGED = Path(str(files("sam_cache") / "model" / "nano.safetensors"))


def test_weights_are_half_precision_and_at_most_16_mb():
    assert PACKAGED.stat().st_size <= 16e6
    with safe_open(PACKAGED, "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118


def test_the_card_says_how_it_was_made():
    card = PACKAGED.with_suffix(".md").read_text()
    for word in ("benchmarks/nano.py", "generated scenes", "held-out", "licence"):
        assert word in card.lower() or word in card, word


@pytest.mark.slow
def test_it_finds_objects_of_scenes_it_has_never_seen(samcache):
    scenes = ("--dataset", "synthetic", "--scenes", 12, "--scene-seed", 77)
    assert samcache("embed", *scenes, "--model", "nano", "--input-size", 224, "--store", "s.zarr") == 0
    options = ("--prompts", "box,interior", "--rows", "all", "--overlays", 0, "--json", "r.json")
    assert samcache("eval", "--store", "s.zarr", *options) == 0
    report = json.loads(Path("r.json").read_text())["untouched"]
    assert report["box"]["all"]["iou"]["mean"] > 0.4
    assert report["interior"]["all"]["iou"]["mean"] > 0.3
