"""The main job, from end to end, through the command line."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sam_cache.config import EvalConfig
from sam_cache.model import fixed_weights, size_of
from sam_cache.stages.evaluate import open_exam
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
    losses = [line["loss"] for line in RunFolder.open(tmp_path / "run").metrics()]
    assert losses[-1] < 0.9 * losses[0]
    assert report["gain"]["box"]["all"]["iou"]["mean"] != 0
    assert {"untouched", "tuned"} <= set(report["average_precision"]["box"])
    assert len(list((tmp_path / "eval" / "overlays").glob("*.png"))) == 2
    assert (tmp_path / "run" / "curves.png").exists()
    assert "tuned" in capsys.readouterr().out


def test_training_holds_rows_out_and_evaluation_uses_exactly_these(samcache, scenes, tmp_path):
    samcache("train-top", "--store", scenes, "--out", "run", "--steps", 1, "--held-out", 0.3, "--seed", 5, *TRAIN)
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["held_out"]
    assert not set(record["trained"]) & set(record["held_out"])
    assert samcache("eval", "--store", scenes, "--run", "run", "--json", "report.json", "--prompts", "box") == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["rows"]["images"] == record["held_out"]


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
    straight, parts = (RunFolder.open(tmp_path / name).load_weights("last") for name in ("straight", "parts"))
    assert straight.keys() == parts.keys()
    assert all(torch.equal(straight[name], parts[name]) for name in straight)


def test_the_store_alone_is_enough_to_train(samcache, scenes, tmp_path):
    """Nothing of where it was made is needed: a copy of the folder trains."""
    shutil.copytree(scenes, tmp_path / "elsewhere.zarr")
    assert samcache("train-top", "--store", "elsewhere.zarr", "--out", "run", "--steps", 1, *TRAIN) == 0


def test_frozen_parts_stay_and_only_trained_ones_are_saved(samcache, scenes, tmp_path):
    samcache("train-top", "--store", scenes, "--out", "run", "--steps", 2, "--train", "decoder", *TRAIN)
    saved = RunFolder.open(tmp_path / "run").load_weights("last")
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
    shard = store / "neck" / "c" / "0" / "0" / "0" / "0"
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


def test_a_run_goes_on_only_as_the_same_run(samcache, scenes, tmp_path, capsys):
    command = ("train-top", "--store", scenes, *TRAIN)
    assert samcache(*command, "--resume") == 2  # which one?
    assert samcache(*command, "--resume", "--out", "nowhere") == 1
    assert samcache(*command, "--out", "run", "--steps", 1) == 0
    for change, named in (("--seed", "seed"), ("--learning-rate", "learning_rate")):
        assert samcache(*command, "--out", "run", "--steps", 2, "--resume", change, 2) == 2
        assert f"{named} was" in capsys.readouterr().err
    assert samcache(*command, "--out", "run", "--steps", 2, "--resume", "--train", "decoder") == 2
    assert samcache(*command, "--out", "run", "--steps", 2, "--resume", "--mask-budget", 3) == 0


def test_a_store_that_moved_is_evaluated_on_the_images_the_run_held_out(samcache, scenes, tmp_path):
    samcache("train-top", "--store", scenes, "--out", "run", "--steps", 1, "--held-out", 0.3, "--seed", 5, *TRAIN)
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    shutil.copytree(scenes, tmp_path / "moved.zarr")
    assert samcache("eval", "--store", "moved.zarr", "--run", "run", "--json", "r.json", "--prompts", "box") == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["rows"]["images"] == record["held_out"]


def test_a_run_of_another_encoder_is_refused(samcache, scenes, capsys):
    samcache("train-top", "--store", scenes, "--out", "run", "--steps", 1, *TRAIN)
    samcache(
        "embed", "--dataset", "synthetic", "--scenes", 2, "--model", "tiny", "--input-size", 64, "--store", "o.zarr"
    )
    capsys.readouterr()
    assert samcache("eval", "--store", "o.zarr", "--run", "run", "--rows", "all") == 1
    assert "preprocessing.input_size" in capsys.readouterr().err
    assert samcache("train-top", "--store", scenes, "--eval-store", "o.zarr", "--out", "x", "--steps", 1, *TRAIN) == 1
    assert samcache("eval", "--store", "o.zarr", "--run", "typo") == 1


def test_another_store_to_evaluate_on_holds_nothing_out(samcache, scenes, tmp_path):
    samcache(
        "embed", "--dataset", "synthetic", "--scenes", 2, "--scene-seed", 9, "--model", "tiny", "--store", "o.zarr"
    )
    assert samcache("train-top", "--store", scenes, "--eval-store", "o.zarr", "--out", "run", "--steps", 1, *TRAIN) == 0
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert len(record["trained"]) == 12
    assert "held_out/score" in RunFolder.open(tmp_path / "run").metrics()[-1]


def test_a_run_from_another_checkpoint_is_evaluated_from_there(samcache, scenes, tmp_path):
    """Frozen parts and buffers of the other checkpoint are part of what was tuned."""
    other = {name: value + 0.1 for name, value in fixed_weights(size_of("tiny")).items()}
    torch.save(other, tmp_path / "other.pth")
    command = ("--out", "run", "--steps", 1, "--checkpoint", "other.pth", "--train", "decoder", *TRAIN)
    assert samcache("train-top", "--store", scenes, *command) == 0
    cfg = EvalConfig(store=scenes, run=tmp_path / "run")
    tuned = open_exam(cfg, torch.device("cpu"))[1]["tuned"].state_dict()
    for name, value in tuned.items():
        if name.startswith("prompt_encoder."):
            assert torch.equal(value, other[name]), name


def test_fewer_images_than_an_unfinished_store_has(samcache, scenes, tmp_path):
    store = tmp_path / "half.zarr"
    shutil.copytree(scenes, store)
    (store / "neck" / "c" / "2" / "0" / "0" / "0").write_bytes(b"")
    samcache("verify", "--store", store, "--repair")
    embed = ("embed", "--dataset", "synthetic", "--scenes", 12, "--model", "tiny", "--shard-rows", 4, "--store", store)
    assert samcache(*embed, "--limit", 4) == 0
    assert len(EmbeddingStore.open(store).uncommitted()) == 1
    assert samcache(*embed) == 0
    assert not EmbeddingStore.open(store).uncommitted()


RECIPE = """
[shared]
store = "r/s.zarr"
[embed]
dataset = "synthetic"
scenes = 4
model = "tiny"
[verify]
[train-top]
out = "r/train-top"
steps = 2
prompts = "box"
[eval]
run = "r/train-top"
out = "r/eval"
prompts = "box"
overlays = 0
"""


def test_a_recipe_skips_what_is_up_to_date_and_redoes_what_is_not(samcache, tmp_path, capsys):
    (tmp_path / "r.toml").write_text(RECIPE)

    def stages_run(*options) -> list[bool]:
        assert samcache("run", "./r.toml", *options) == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("[")]
        return ["skipped" not in line and "left alone" not in line for line in lines]

    assert stages_run() == [True, True, True, True]
    assert stages_run() == [True, False, False, False]  # embed looks by itself, and finds nothing to do
    assert stages_run("--set", "eval.prompts=interior") == [True, False, False, True]
    assert stages_run("--set", "train-top.steps=3", "--set", "eval.prompts=interior") == [True, False, True, True]
    assert stages_run("--from", "train-top") == [False, False, True, True]
    assert len(list((tmp_path / "r").glob("train-top*"))) == 3  # outdated runs are kept aside


def test_a_run_of_a_version_with_fewer_knobs_goes_on(samcache, scenes, tmp_path):
    """What it does not say was as the defaults are: knobs are added so that they change nothing."""
    command = ("train-top", "--store", scenes, "--out", "run", *TRAIN)
    assert samcache(*command, "--steps", 1) == 0
    written = tmp_path / "run" / "config.json"
    config = json.loads(written.read_text())
    for knob in ("head", "hq_output", "views", "box_noise", "loss_points"):
        del config[knob]
    written.write_text(json.dumps(config))
    assert samcache(*command, "--steps", 2, "--resume") == 0
    assert samcache(*command, "--steps", 3, "--resume", "--no-box-noise") == 2
