"""The HQ head through the commands: embedded with its early level, trained from the store, scored, exported."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from sam_cache.batches import CachedBatches, Order, Sampling
from sam_cache.config import TrainTopConfig
from sam_cache.data import Geometry, decode, open_dataset, parse_prompts, rle_to_mask, to_pixels
from sam_cache.model import (
    SIZES,
    Top,
    add_head,
    fixed_weights,
    freeze,
    load_encoder,
    masks_to_image,
    top_from_bytes,
    write_state,
)
from sam_cache.model.parts import is_of_hq_head
from sam_cache.model.weights import fresh_head
from sam_cache.stages.cached_data import CachedData
from sam_cache.stages.decoding import SamObjective
from sam_cache.stages.training import loss_weights
from sam_cache.stages.tuned_sam import open_tuned_top
from sam_cache.store import EmbeddingStore
from sam_cache.training import LossWeights, Pace, RunFolder, make_accelerator
from sam_cache.training.fit import backpropagate
from sam_cache.types import Prompts

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
    assert reports["own"]["hq_output"] == mode
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


@torch.no_grad()
def by_hand(network, image, corners):
    """The network called directly: masks (P, H, W); for `corners` (P, 4) as boxes, or for no prompt at all."""
    geometry, count = Geometry(*image.shape[:2], SIZES["tiny"].input_size), max(1, len(corners))
    content = torch.tensor([[geometry.content_height, geometry.content_width]])
    pixels = torch.from_numpy(to_pixels(image, geometry)).permute(2, 0, 1)[None]
    levels = load_encoder("tiny", levels=("neck", "early"))(pixels, content)
    prompts = Prompts(
        image_index=torch.zeros(count, dtype=torch.long),
        kind=torch.zeros(count, dtype=torch.long),
        points_xy_input=torch.zeros(0, 2),
        labels=torch.zeros(0, dtype=torch.long),
        offsets=torch.zeros(count + 1, dtype=torch.long),
        boxes_xyxy_input=torch.from_numpy(geometry.boxes_to_input(np.array(corners or [[0.0] * 4]))).float(),
        has_box=torch.tensor([len(corners) > 0] * count),
        has_mask=torch.zeros(count, dtype=torch.bool),
        chance=torch.zeros(count, 2),
    )
    logits = network(network.prepare(levels), prompts, multimask=False).logits[:, 0]
    shown = masks_to_image(logits, geometry.input_size, tuple(content[0].tolist()), image.shape[:2])
    return (shown > 0).numpy()


@pytest.mark.parametrize("prompts", ["boxes", "none"])
@pytest.mark.parametrize("mode", ["hq", "sum"])
def test_predictions_are_the_heads_as_by_hand(samcache, run_of, tmp_path, mode, prompts):
    """In the mode of the run: neither SAM's masks nor those of the other mode would pass."""
    scenes = open_dataset("synthetic", count=1, size=80)
    (tmp_path / "photos").mkdir()
    image = decode(scenes.read(scenes.images[0]), scenes.images[0]).image
    Image.fromarray(image).save(tmp_path / "photos" / "a.png")
    boxes = [[5, 6, 30, 20], [20, 10, 55, 60], [0, 0, 70, 70]] if prompts == "boxes" else []
    (tmp_path / "boxes.json").write_text(json.dumps({
        "images": [{"id": 7, "file_name": "a.png"}],
        "annotations": [{"id": n, "image_id": 7, "bbox": box, "category_id": 1} for n, box in enumerate(boxes)],
        "categories": [{"id": 1, "name": "thing"}],
    }))  # fmt: skip
    asked = ("--boxes", "boxes.json") if boxes else ("--prompts", "none")
    assert samcache("predict", "--run", run_of(mode), "--which", "last", "--images", "photos", *asked, "--out", "out",
                    "--mask-budget", 2) == 0  # fmt: skip
    answers = json.loads((tmp_path / "out" / "predictions.json").read_text())["annotations"]
    size = list(image.shape[:2])
    assert all(answer["segmentation"]["size"] == size for answer in answers)
    found = np.array([rle_to_mask(answer["segmentation"]["counts"].encode(), *size) for answer in answers], bool)

    top = open_tuned_top(RunFolder.open(run_of(mode)), "last").eval()
    corners = [[x, y, x + w, y + h] for x, y, w, h in boxes]
    np.testing.assert_array_equal(found, by_hand(top, image, corners))
    assert 0 < found.mean() < 1
    top.hq = "hq" if mode == "sum" else "sum"
    assert not np.array_equal(found, by_hand(top, image, corners))
    assert not np.array_equal(found, by_hand(Top(top.size, top.state_dict()).eval(), image, corners))


@pytest.mark.parametrize(
    ("command", "code", "text"),
    [
        (("train-top", "--head", "hq", "--steps", 1, "--out", "x"), 1, "--levels neck,early"),
        (("train-top", "--hq-output", "sum", "--steps", 1, "--out", "x"), 2, "add --head hq"),
        (("train-top", "--train", "head", "--steps", 1, "--out", "x"), 2, "add --head hq"),
    ],
)
def test_what_a_store_without_the_level_cannot_do(samcache, scenes, capsys, tmp_path, command, code, text):
    assert samcache(*command, "--store", scenes) == code
    assert not (tmp_path / "x").exists()
    error = capsys.readouterr().err
    assert text in error
    assert error.strip().splitlines()[-1].startswith(("error: ", "usage error: "))


def test_an_early_dtype_without_the_level_is_refused(samcache, capsys):
    assert samcache("embed", *SCENES, "--scenes", 2, "--early-dtype", "int8", "--store", "a.zarr") == 2
    assert "add --levels neck,early" in capsys.readouterr().err
    assert samcache("embed", *SCENES, "--scenes", 2, "--levels", "neck,late", "--store", "a.zarr") == 2
    assert "--levels neck,late: unknown level 'late'; use neck or early" in capsys.readouterr().err


def test_a_checkpoint_of_another_size_is_refused(samcache, store, tmp_path, capsys):
    nano = SIZES["nano"]
    write_state(tmp_path / "hq_nano.pth", fixed_weights(nano) | fresh_head(nano))
    assert samcache("train-top", "--store", store, "--checkpoint", "hq_nano.pth", "--out", "x", *QUICK) == 1
    assert "hq_nano.pth: this looks like HQ-SAM's nano, not tiny" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_file_with_the_head_is_scored_without_training(samcache, store, scenes, run_of, capsys, tmp_path):
    """As an official checkpoint would be, and by the sum, as its predictor answers."""
    score = ("eval", "--prompts", "box", "--overlays", 0, "--rows", "all", "--no-average-precision")
    assert samcache("export", "--run", run_of("sum"), "--which", "last", "--format", "sam-hq", "--out", "hq.pth") == 0
    assert samcache(*score, "--store", store, "--checkpoint", "hq.pth", "--json", "file.json") == 0
    assert samcache(*score, "--store", store, "--run", run_of("sum"), "--which", "last", "--json", "run.json") == 0
    file, run = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("file", "run"))
    assert (file["hq_output"], file["run"], file["which"]) == ("sum", None, None)
    assert file["tuned"] == run["tuned"]
    capsys.readouterr()
    for arguments, code, text in [
        (("--store", scenes, "--checkpoint", "hq.pth"), 1, "--levels neck,early"),
        (("--store", store, "--hq-output", "sum"), 2, "is for a --run or --checkpoint with the HQ head"),
        (("--store", store, "--run", run_of("hq"), "--checkpoint", "hq.pth"), 2, "give one of the two"),
    ]:
        assert samcache(*score, *arguments) == code
        assert text in capsys.readouterr().err
    state = torch.load("hq.pth", weights_only=True)
    state["image_encoder.pos_embed"] += 1
    write_state(tmp_path / "other.pth", state)
    assert samcache(*score, "--store", store, "--checkpoint", "other.pth") == 1
    assert "its encoder is not the one" in capsys.readouterr().err


def test_the_iou_loss_leaves_the_head_alone_unless_asked(store):
    """The head's token could bend the frozen decoder's scores, which are of other masks."""
    top = add_head(top_from_bytes(EmbeddingStore.open(store).base), "hq", seed=0)
    freeze(top, {"head"})
    assert loss_weights(TrainTopConfig(head="hq"), top).iou == 0
    assert loss_weights(TrainTopConfig(head="hq", iou_weight=1), top).iou == 1
    freeze(top, {"head", "decoder"})
    assert loss_weights(TrainTopConfig(head="hq"), top).iou == 1


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
