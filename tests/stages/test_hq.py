"""The HQ head through the commands: embedded with its early level, trained from the store, scored, exported."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from sam_cache.batches import CachedBatches, Order, Sampling
from sam_cache.data import parse_prompts
from sam_cache.model import SIZES, add_head, fixed_weights, freeze, top_from_bytes, write_state
from sam_cache.model.parts import is_of_hq_head
from sam_cache.model.weights import fresh_head
from sam_cache.stages.cached_data import CachedData
from sam_cache.stages.decoding import SamObjective
from sam_cache.store import EmbeddingStore
from sam_cache.training import LossWeights, Pace, RunFolder, make_accelerator
from sam_cache.training.fit import backpropagate

QUICK = ("--head", "hq", "--prompts", "box,point+10,noise-mask", "--batch-size", 2, "--max-objects", 3, "--warmup", 0,
         "--learning-rate", 1e-3)  # fmt: skip
SCENES = ("--dataset", "synthetic", "--model", "tiny", "--shard-rows", 4, "--batch-size", 2)


@pytest.fixture(scope="module")
def store(invoke, tmp_path_factory):
    """Twelve scenes with both levels, early as int8. Read only."""
    path = tmp_path_factory.mktemp("hq") / "scenes.zarr"
    assert invoke("embed", *SCENES, "--scenes", 12, "--levels", "neck,early", "--early-dtype", "int8",
                  "--store", path) == 0  # fmt: skip
    return path


@pytest.fixture(scope="module")
def run_of(invoke, tmp_path_factory, store):
    """A run of four steps in one of the two modes. Read only."""
    folder = tmp_path_factory.mktemp("runs")

    def run_of(mode):
        if not (folder / mode).exists():
            assert invoke("train-top", "--store", store, "--out", folder / mode, "--steps", 4, *QUICK,
                          "--hq-output", mode, "--loss", "uncertain-points", "--iou-weight", 0) == 0  # fmt: skip
        return folder / mode

    return run_of


def test_info_tells_bytes_by_level(samcache, store, capsys):
    assert samcache("info", "--store", store, "--json") == 0
    size, found = SIZES["tiny"], json.loads(capsys.readouterr().out)
    tokens = size.grid**2
    assert found["bytes"]["neck"]["per row"] == 2 * size.neck_channels * tokens
    assert found["bytes"]["early"]["per row"] == size.width * (tokens + 8)  # fp32 scale and offset per channel
    assert found["identity"]["levels"]["early"]["dtype"] == "int8"


def test_the_head_alone_is_trained_and_its_mode_recorded(run_of):
    run = RunFolder.open(run_of("sum"))
    weights = run.load_weights("last")
    assert set(weights) == {key for key in fresh_head(SIZES["tiny"])}
    assert all(not torch.equal(weights[key], tensor) for key, tensor in fresh_head(SIZES["tiny"]).items())
    assert run.read_json("record.json")["hq"] == "sum"


@pytest.mark.parametrize("mode", ["hq", "sum"])
def test_evaluation_takes_the_mode_of_the_run_unless_told(samcache, store, run_of, mode, tmp_path):
    run = run_of(mode)
    for name, told in (("own", ()), ("hq", ("--hq-output", "hq")), ("sum", ("--hq-output", "sum"))):
        assert samcache("eval", "--store", store, "--run", run, "--which", "last", "--prompts", "box,noise-mask",
                        "--json", f"{name}.json", "--overlays", 0, *told) == 0  # fmt: skip
    reports = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("own", "hq", "sum")}
    assert reports["own"]["tuned"] == reports[mode]["tuned"]
    assert reports["hq"]["tuned"] != reports["sum"]["tuned"]
    assert reports["hq"]["untouched"] == reports["sum"]["untouched"]


def test_two_steps_resumed_to_four_are_four_steps(samcache, store, tmp_path):
    common = ("train-top", "--store", store, *QUICK, "--schedule", "constant")
    assert samcache(*common, "--out", "straight", "--steps", 4) == 0
    assert samcache(*common, "--out", "parts", "--steps", 2) == 0
    assert samcache(*common, "--out", "parts", "--steps", 4, "--resume") == 0
    straight, parts = (RunFolder.open(tmp_path / name).load_weights("last") for name in ("straight", "parts"))
    assert all(torch.equal(parts[key], tensor) for key, tensor in straight.items())


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("mode", ["hq", "sum"])
def test_an_export_loads_in_the_package_and_starts_another_run(samcache, store, run_of, capsys, tmp_path, mode, suffix):
    file = f"hq.{suffix}"
    assert samcache("export", "--run", run_of(mode), "--which", "last", "--format", "sam-hq", "--out", file) == 0
    said = capsys.readouterr().out
    assert f"{file}: loads in segment_anything_hq; largest logit difference" in said
    assert samcache("train-top", "--store", store, "--out", "again", "--checkpoint", file, "--steps", 1, *QUICK) == 0
    start = top_from_bytes((tmp_path / "again" / "start.safetensors").read_bytes())
    trained = RunFolder.open(run_of(mode)).load_weights("last")
    assert all(torch.equal(start.state_dict()[key], tensor) for key, tensor in trained.items())


def test_predictions_of_the_head(samcache, run_of, tmp_path):
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(tmp_path / "photos" / "a.png")
    assert samcache("predict", "--run", run_of("hq"), "--which", "last", "--images", "photos", "--prompts", "none",
                    "--out", "out") == 0  # fmt: skip
    assert (tmp_path / "out" / "predictions.json").exists()


@pytest.mark.parametrize(
    ("command", "code", "text"),
    [
        (("train-top", "--head", "hq", "--steps", 1, "--out", "x"), 1, "--levels neck,early"),
        (("train-top", "--hq-output", "sum", "--steps", 1, "--out", "x"), 2, "add --head hq"),
        (("train-top", "--train", "head", "--steps", 1, "--out", "x"), 2, "unknown part 'head'"),
    ],
)
def test_what_a_store_without_the_level_cannot_do(samcache, scenes, capsys, command, code, text):
    assert samcache(*command, "--store", scenes) == code
    error = capsys.readouterr().err
    assert text in error
    assert error.strip().splitlines()[-1].startswith(("error: ", "usage error: "))


def test_an_early_dtype_without_the_level_is_refused(samcache, capsys):
    assert samcache("embed", *SCENES, "--scenes", 2, "--early-dtype", "int8", "--store", "a.zarr") == 2
    assert "add --levels neck,early" in capsys.readouterr().err
    assert samcache("embed", *SCENES, "--scenes", 2, "--levels", "neck,late", "--store", "a.zarr") == 2
    assert "level 'late': an encoder has neck and early" in capsys.readouterr().err


def test_a_checkpoint_of_another_size_is_refused(samcache, store, tmp_path, capsys):
    nano = SIZES["nano"]
    write_state(tmp_path / "hq_nano.pth", fixed_weights(nano) | fresh_head(nano))
    assert samcache("train-top", "--store", store, "--checkpoint", "hq_nano.pth", "--out", "x", *QUICK) == 1
    assert "hq_nano.pth: this looks like HQ-SAM's nano, not tiny" in capsys.readouterr().err


def test_formats_that_a_run_is_not_of_are_refused(samcache, scenes, run_of, capsys):
    assert samcache("export", "--run", run_of("hq"), "--which", "last", "--format", "sam") == 2
    assert "has the HQ head; use --format sam-hq" in capsys.readouterr().err
    assert samcache("train-top", "--store", scenes, "--out", "plain", "--steps", 1, "--warmup", 0) == 0
    assert samcache("export", "--run", "plain", "--format", "sam-hq") == 2
    assert "was trained without the HQ head; use --format sam" in capsys.readouterr().err
    assert samcache("eval", "--store", scenes, "--run", "plain", "--hq-output", "sum") == 2


def test_the_images_features_are_made_once_and_their_gradient_is_that_of_all_chunks(store, tmp_path):
    data = CachedData.open(store, annotations=None, partial=False, held_out=0, seed=0, levels=("neck", "early"))
    top = add_head(top_from_bytes(EmbeddingStore.open(store).base), "hq", seed=0)
    freeze(top, {"head"})
    annotator = data.annotator(top.size.mask_size, Sampling(parse_prompts("box,point"), seed=1, training=True))
    batches = CachedBatches(data.store, annotator, Order(data.train, seed=0), batch_size=2, levels=top.levels)
    batch = next(iter(batches))
    calls = []
    for layer in (top.mask_decoder.compress_vit_feat, top.mask_decoder.embedding_encoder):
        layer.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    accelerator = make_accelerator(torch.device("cpu"), "fp32", tmp_path)
    found = []
    for budget in (len(batch.prompts), 3):
        assert len(list(batch.chunks(budget))) > (budget == 3)
        pace = Pace(1, 1, 1, mask_budget=budget)
        for _ in backpropagate(top, replace(batch), SamObjective(LossWeights(), "points"), accelerator, 1.0, pace):
            pass
        found.append({name: parameter.grad for name, parameter in top.named_parameters() if parameter.requires_grad})
        top.zero_grad(set_to_none=True)
    assert calls == [2, 2, 2, 2]  # both images at once, by two layers, in two steps
    whole, chunked = found
    for name, gradient in whole.items():
        assert (chunked[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name


def test_a_store_of_the_level_serves_sam_too(samcache, store, tmp_path):
    assert samcache("train-top", "--store", store, "--out", "run", "--steps", 1, "--warmup", 0) == 0
    assert not any(map(is_of_hq_head, RunFolder.open(tmp_path / "run").load_weights("last")))
