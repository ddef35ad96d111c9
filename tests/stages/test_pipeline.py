"""The main job, from end to end, through the command line."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sam_cache.store import EmbeddingStore
from sam_cache.training import RunFolder

TRAIN = ("--prompts", "box", "--batch-size", 2, "--max-objects", 3, "--warmup", 1, "--learning-rate", 1e-3)


def test_embed_verify_train_and_evaluate(samcache, scenes, capsys, tmp_path):
    assert samcache("verify", "--store", scenes) == 0
    assert samcache("info", "--store", scenes) == 0
    assert samcache("train-top", "--store", scenes, "--out", "run", "--steps", 30, *TRAIN) == 0
    assert samcache("eval", "--store", scenes, "--run", "run", "--out", "eval", "--prompts", "box,interior",
                    "--json", "report.json", "--overlays", 1) == 0  # fmt: skip
    report = json.loads((tmp_path / "report.json").read_text())
    losses = [line["loss"] for line in RunFolder(tmp_path / "run", resume=True).metrics()]
    assert losses[-1] < losses[0] / 2
    assert report["gain"]["box"]["all"]["iou"]["mean"] != 0
    assert {"untouched", "tuned"} <= set(report["average_precision"]["box"])
    assert len(list((tmp_path / "eval" / "overlays").glob("*.png"))) == 2
    assert (tmp_path / "run" / "curves.png").exists()
    assert "tuned" in capsys.readouterr().out


def test_training_holds_rows_out_and_evaluation_uses_exactly_these(samcache, scenes, tmp_path):
    samcache("train-top", "--store", scenes, "--out", "run", "--steps", 1, "--held-out", 0.3, "--seed", 5, *TRAIN)
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert not set(record["rows"]) & set(record["held_out"])
    assert samcache("eval", "--store", scenes, "--run", "run", "--json", "report.json", "--prompts", "box") == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["rows"]["rows"] == record["held_out"]


def test_a_run_is_never_overwritten(samcache, scenes):
    command = ("train-top", "--store", scenes, "--out", "run", "--steps", 1, *TRAIN)
    assert samcache(*command) == 0
    assert samcache(*command) == 2
    assert samcache(*command, "--resume") == 0


@pytest.mark.parametrize("schedule", ["step", "cosine"])
def test_two_steps_resumed_to_four_are_four_steps(samcache, scenes, tmp_path, schedule):
    """Bit for bit. A cosine knows its end, so there the first two steps are within the warm-up."""
    common = ("train-top", "--store", scenes, "--schedule", schedule, "--milestones", "1", *TRAIN, "--warmup", 4)
    assert samcache(*common, "--out", "straight", "--steps", 4) == 0
    assert samcache(*common, "--out", "parts", "--steps", 2) == 0
    assert samcache(*common, "--out", "parts", "--steps", 3, "--resume") == 0
    assert samcache(*common, "--out", "parts", "--steps", 4, "--resume") == 0
    straight, parts = (RunFolder(tmp_path / name, resume=True).load_weights("last") for name in ("straight", "parts"))
    assert straight.keys() == parts.keys()
    assert all(torch.equal(straight[name], parts[name]) for name in straight)


def test_the_store_alone_is_enough_to_train(samcache, scenes, tmp_path):
    """Nothing of where it was made is needed: a copy of the folder trains."""
    shutil.copytree(scenes, tmp_path / "elsewhere.zarr")
    assert samcache("train-top", "--store", "elsewhere.zarr", "--out", "run", "--steps", 1, *TRAIN) == 0


def test_frozen_parts_stay_and_only_trained_ones_are_saved(samcache, scenes, tmp_path):
    samcache("train-top", "--store", scenes, "--out", "run", "--steps", 2, "--train", "decoder", *TRAIN)
    saved = RunFolder(tmp_path / "run", resume=True).load_weights("last")
    assert saved
    assert all(name.startswith("mask_decoder.") for name in saved)


def test_embedding_again_does_nothing(samcache, tmp_path):
    command = (
        "embed",
        "--dataset",
        "synthetic",
        "--scenes",
        5,
        "--model",
        "tiny",
        "--shard-rows",
        2,
        "--store",
        "s.zarr",
    )
    assert samcache(*command) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s.zarr").rglob("c/*/0/0/0")}
    assert samcache(*command) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "s.zarr").rglob("c/*/0/0/0")}
    assert samcache(*command[:-2], "--store", "s.zarr", "--fit", "squash") == 1  # another identity


def test_a_grown_dataset_appends(samcache, tmp_path):
    command = ("embed", "--dataset", "synthetic", "--model", "tiny", "--shard-rows", 4, "--store", "s.zarr")
    assert samcache(*command, "--scenes", 5) == 0
    first = EmbeddingStore.open(tmp_path / "s.zarr")
    assert samcache(*command, "--scenes", 7) == 0
    grown = EmbeddingStore.open(tmp_path / "s.zarr")
    assert len(grown.images.rows) == 7
    assert np.array_equal(grown.images.rows[:5], first.images.rows)
    assert samcache("verify", "--store", "s.zarr") == 0
    assert samcache("train-top", "--store", "s.zarr", "--steps", 1, "--out", "run", *TRAIN) == 0


def test_damage_is_found_and_repaired(samcache, scenes, tmp_path):
    store = tmp_path / "damaged.zarr"
    shutil.copytree(scenes, store)
    shard = next((store / "neck" / "c").rglob("0/0/0"))
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(bytes(data))
    assert samcache("verify", "--store", store) == 3
    assert samcache("verify", "--store", store, "--repair") == 3
    assert samcache("train-top", "--store", store, "--steps", 1, *TRAIN) == 1  # unfinished now
    assert samcache("embed", "--dataset", "synthetic", "--scenes", 12, "--model", "tiny", "--shard-rows", 4,
                    "--batch-size", 2, "--store", store) == 0  # fmt: skip
    assert samcache("verify", "--store", store) == 0


def test_weights_of_a_checkpoint_are_safetensors(samcache, scenes, tmp_path):
    samcache("train-top", "--store", scenes, "--out", "run", "--steps", 1, *TRAIN)
    named = (tmp_path / "run" / "last").read_text().strip()
    assert load_file(tmp_path / "run" / "checkpoints" / named / "weights.safetensors")
