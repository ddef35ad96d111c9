"""Training end to end: what moves, what stays, and that it is the step the cache is compared with."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sam_cache import config
from sam_cache.batches import Sampling
from sam_cache.data import parse_prompts
from sam_cache.model import fixed_weights, load_sam, size_of
from sam_cache.stages.schedule import choose_repeats, make_optimizer
from sam_cache.stages.train_full import open_data, open_sam
from sam_cache.stages.tuned_sam import config_of, open_tuned
from sam_cache.training import RunFolder

SCENES = ("--dataset", "synthetic", "--scenes", 10, "--model", "tiny", "--max-objects", 3, "--warmup", 0)
SHORT = (*SCENES, "--steps", 2, "--evaluate-every", 2, "--evaluate-images", 1, "--learning-rate", 1e-3)
ADAPTERS = ("none", "sa", "lora", "spm")


def config_for(**values) -> config.TrainFullConfig:
    return config.TrainFullConfig(dataset="synthetic", scenes=10, model="tiny", **values)


def mask_logits(sam, rows=(0, 1)):
    """Logits for the boxes of two scenes."""
    data = open_data(config_for(), sam.size.input_size)
    exams = data.exams(rows, parse_prompts("box").kinds, 0, sam.size.mask_size)
    with torch.no_grad():
        return [sam.eval()(sam.encode(exam.batch), exam.batch.prompts, False).logits for (exam,) in exams]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_trained_parameters_all_change_and_frozen_ones_by_no_bit(samcache, tmp_path, adapter):
    options = ("--sa-start", "official", "--prompts", "box,point,none")
    assert samcache("train-full", *SHORT, "--adapter", adapter, "--out", "run", *options) == 0
    run = RunFolder.open(tmp_path / "run")
    before, after = open_sam(config_of(run)), open_tuned(run, "last")
    trained = {name for name, parameter in before.named_parameters() if parameter.requires_grad}
    assert trained == set(run.load_weights("last"))
    moved = {
        name
        for (name, old), (_, new) in zip(before.named_parameters(), after.named_parameters(), strict=True)
        if not torch.equal(old, new)
    }
    assert moved <= trained
    # What no prompt or no gradient reaches in two steps: a low-rank `down` behind an `up` of zeros at first.
    assert trained - moved <= {name for name in trained if "low_rank_down" in name or ".down." in name}
    if adapter != "none":
        assert all(".adapter." in name or ".low_rank_" in name for name in trained if name.startswith("image_encoder"))
        assert "prompt_encoder.no_mask_embed.weight" in trained
        assert not any(name.startswith("prompt_encoder.point") for name in trained)


@pytest.mark.parametrize("adapter", ADAPTERS[1:])
def test_an_adapter_that_starts_as_the_identity_leaves_the_masks_as_they_are(adapter):
    adapted = open_sam(config_for(adapter=adapter))
    for found, expected in zip(mask_logits(adapted), mask_logits(load_sam("tiny")), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("adapter", ADAPTERS[1:])
def test_adapter_weights_alone_are_saved_and_load_back_to_the_same_masks(samcache, tmp_path, adapter):
    assert samcache("train-full", *SHORT, "--adapter", adapter, "--out", "run", "--train", "no-mask") == 0
    run = RunFolder.open(tmp_path / "run")
    weights = run.load_weights("last")
    assert not any(".vit." in name and ".low_rank_" not in name for name in weights)
    sam = open_sam(config_of(run))
    own = dict(sam.named_parameters())
    for name, value in weights.items():
        own[name].data.copy_(value)
    for found, expected in zip(mask_logits(open_tuned(run, "last")), mask_logits(sam), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"model": "vit_b", "adapter": "sa", "train": ("decoder",)}, 63_312 + 4_058_340),
        ({"model": "vit_b", "adapter": "sa", "sa_variant": "between", "train": ("decoder",)}, 400_928 + 4_058_340),
        ({"model": "vit_b", "adapter": "lora", "train": ("decoder",)}, 12 * 4 * 768 * 2 * 2 + 4_058_340),
    ],
)
@pytest.mark.slow
def test_number_of_trained_parameters(options, expected, tmp_path):
    torch.save(fixed_weights(size_of("vit_b")), tmp_path / "vit_b.pth")
    sam = open_sam(config.TrainFullConfig(checkpoint=tmp_path / "vit_b.pth", **options))
    assert sum(parameter.numel() for parameter in sam.parameters() if parameter.requires_grad) == expected


def test_the_live_step_is_the_cached_step(samcache, tmp_path):
    """Same images, objects, prompts and order: only that one of them runs the frozen encoder every time."""
    options = ("--steps", 4, "--warmup", 1, "--prompts", "box,point,none", "--max-objects", 2, "--batch-size", 3)
    scenes = SCENES[: SCENES.index("--max-objects")]
    assert samcache("embed", *scenes, "--store", "s.zarr", "--dtype", "fp32") == 0
    assert samcache("train-top", "--store", "s.zarr", "--out", "cached", *options) == 0
    assert (
        samcache("train-full", *scenes, "--train", "prompt,decoder", "--adapter", "none", "--out", "live", *options)
        == 0
    )
    cached, live = (RunFolder.open(tmp_path / name) for name in ("cached", "live"))
    assert cached.read_json("record.json")["held_out"] == live.read_json("record.json")["held_out"]
    for one, other in zip(cached.metrics(), live.metrics(), strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"images_per_second"}:
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
    assert cached.load_weights().keys() == live.load_weights().keys()


def test_checkpointing_changes_no_loss(samcache, tmp_path):
    for name in ("checkpointing", "no-checkpointing"):
        assert samcache("train-full", *SHORT, "--adapter", "sa", f"--{name}", "--out", name) == 0
    logs = [RunFolder.open(tmp_path / name).metrics() for name in ("checkpointing", "no-checkpointing")]
    for one, other in zip(*logs, strict=True):
        assert one["loss"] == other["loss"]
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-5)


@pytest.mark.parametrize("loss", ["bce-iou", "balanced-bce-iou", "points"])
def test_other_losses_are_logged_by_their_names(samcache, tmp_path, loss):
    assert samcache("train-full", *SHORT, "--loss", loss, "--precision", "bf16", "--out", "run") == 0
    line = RunFolder.open(tmp_path / "run").metrics()[-1]
    assert {"bce-iou": "soft_iou", "balanced-bce-iou": "balanced_bce", "points": "dice"}[loss] in line
    assert np.isfinite(line["loss"])


def test_estimated_and_measured_memory_are_said_and_kept(samcache, tmp_path, capsys):
    assert samcache("train-full", *SHORT, "--out", "run") == 0
    said = capsys.readouterr().err
    assert "GiB estimated" in said
    assert "at the peak" in said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["peak_memory"] > 0
    assert summary["estimated_memory"] > 0
    assert (tmp_path / "run" / "curves.png").exists()


def test_eval_scores_a_run_on_its_own_images(samcache, tmp_path, capsys):
    assert samcache("train-full", *SHORT, "--adapter", "lora", "--out", "run") == 0
    assert samcache("eval", "--run", "run", "--prompts", "box,none", "--json", "report.json", "--overlays", 1) == 0
    report = json.loads(Path("report.json").read_text())
    assert report["rows"]["images"] == RunFolder.open(tmp_path / "run").read_json("record.json")["held_out"]
    assert set(report["tuned"]) == {"box", "none"}
    assert samcache("eval", "--run", "run", "--store", "s.zarr") == 2
    assert "leave it" in capsys.readouterr().err


def test_layers_farther_from_the_masks_learn_more_slowly():
    cfg = config_for(layer_decay=0.5)
    sam = open_sam(cfg)
    optimizer, _ = make_optimizer(cfg, sam, 10, cfg.layer_decay)
    scale = {id(p): group["scale"] for group in optimizer.param_groups for p in group["params"]}
    named = {name: scale[id(p)] for name, p in sam.named_parameters() if p.requires_grad}
    assert named["mask_decoder.iou_token.weight"] == named["image_encoder.vit.neck.0.weight"] == 1
    assert named["image_encoder.vit.blocks.1.attn.qkv.weight"] == 0.5
    assert named["image_encoder.vit.blocks.0.attn.qkv.weight"] == 0.25
    assert named["image_encoder.vit.pos_embed"] == 0.125


def test_object_sampling_asks_for_every_object_once_an_epoch():
    """Of 7 objects, 3 at a time: three visits with 3, 3 and 1 different ones."""
    sampling = Sampling(parse_prompts("box"), 0, True, max_objects=3, by_object=True)
    from sam_cache.batches import Visit

    for epoch in (0, 1):
        chosen = [sampling.choose(7, 42, Visit(0, epoch, number))[0].tolist() for number in range(3)]
        assert sorted(sum(chosen, [])) == list(range(7))
    repeats = choose_repeats(config_for(sampling="object", max_objects=3), [np.arange(7), np.arange(3), np.arange(0)])
    assert repeats.tolist() == [3, 1, 0]


def test_repeat_factors_are_those_of_lvis():
    """Gupta et al. 2019: max(1, sqrt(t / f)), an image taking the largest of its categories."""
    categories = [np.array([1, 1])] * 99 + [np.array([1, 2])]
    repeats = choose_repeats(config_for(sampling="repeat-factor", repeat_threshold=0.04), categories)
    assert repeats[:99].tolist() == [1.0] * 99
    assert repeats[99] == pytest.approx(2.0)


@pytest.mark.parametrize("sampling", ["object", "repeat-factor"])
def test_other_samplings_train(samcache, sampling):
    assert samcache("train-full", *SHORT, "--sampling", sampling, "--out", "run") == 0


def test_early_stopping_ends_well(samcache, tmp_path, capsys):
    """A learning rate of nearly nothing: no evaluation is better than the first one."""
    options = (*SCENES, "--steps", 50, "--evaluate-every", 1, "--evaluate-images", 1, "--learning-rate", 1e-30)
    assert samcache("train-full", *options, "--patience", 2, "--best-by", "iou/box", "--out", "run") == 0
    assert RunFolder.open(tmp_path / "run").read_json("summary.json")["step"] == 3
    assert "stopped early" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--train", "enocder"), "unknown part 'enocder'"),
        (("--adapter", "lora", "--lora-rank", 0), "--lora-rank"),
        (("--augment", "hflop"), "hflip"),
        (("--best-by", "iou/bocks"), "--best-by"),
        (("--trackers", "tensorbored"), "--trackers"),
        (("--held-out", 0.99), "--held-out"),
    ],
)
def test_usage_errors_name_the_flag(samcache, capsys, options, said):
    assert samcache("train-full", *SHORT, "--out", "run", *options) in (1, 2)
    assert said in capsys.readouterr().err


def test_a_checkpoint_of_another_rank_is_refused(samcache, tmp_path, capsys):
    assert samcache("train-full", *SHORT, "--adapter", "lora", "--out", "run") == 0
    assert samcache("train-full", *SHORT, "--adapter", "lora", "--lora-rank", 2, "--out", "run", "--resume") == 2
    assert "lora_rank was 4, is 2" in capsys.readouterr().err
    cfg = json.loads(Path("run/config.json").read_text()) | {"lora_rank": 2}
    Path("run/config.json").write_text(json.dumps(cfg))
    assert samcache("eval", "--run", "run") == 1
    assert "another model, adapter or rank" in capsys.readouterr().err


def test_sa_trains_without_any_prompt(samcache, tmp_path):
    assert samcache("train-full", *SHORT, "--adapter", "sa", "--prompts", "none", "--out", "run") == 0
    assert "held_out/iou/none" in RunFolder.open(tmp_path / "run").metrics()[-1]


@pytest.fixture
def photographs(tmp_path) -> Path:
    """A COCO folder of 12 images, of which every third has an object; the others have none."""
    images = []
    annotations = []
    for id in range(1, 13):
        picture = np.random.default_rng(id).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        (tmp_path / "data" / "images").mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(tmp_path / "data" / "images" / f"{id}.png")
        images.append({"id": id, "file_name": f"{id}.png", "height": 40, "width": 60})
        if id % 3 == 0:
            corners = [5.0, 5, 30, 5, 30, 30, 5, 30]
            annotations.append({"id": id, "image_id": id, "category_id": 1, "segmentation": [corners]})
    contents = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "square"}]}
    (tmp_path / "data" / "objects.json").write_text(json.dumps(contents))
    return tmp_path / "data"


PHOTOGRAPHS = ("--dataset", "coco", "--images", "data/images", "--annotations", "data/objects.json", "--model", "tiny")


def test_images_without_objects_are_left_out_as_the_cache_leaves_them_out(samcache, tmp_path, photographs):
    options = ("--steps", 2, "--warmup", 0, "--held-out", 0.3)
    assert samcache("embed", *PHOTOGRAPHS, "--store", "s.zarr") == 0
    assert samcache("train-top", "--store", "s.zarr", "--out", "cached", *options) == 0
    assert samcache("train-full", *PHOTOGRAPHS, "--out", "live", *options) == 0
    cached, live = (RunFolder.open(tmp_path / name).read_json("record.json") for name in ("cached", "live"))
    assert len(live["trained"] + live["held_out"]) == 4
    assert (cached["trained"], cached["held_out"]) == (live["trained"], live["held_out"])


def test_a_run_opens_from_any_folder_and_after_its_images_have_moved(samcache, tmp_path, photographs, monkeypatch):
    relative = [part.removeprefix("data/") if isinstance(part, str) else part for part in PHOTOGRAPHS]
    options = ("--steps", 1, "--warmup", 0, "--held-out", 0.3, "--out", "run")
    assert samcache("train-full", *relative, "--root", "data", *options) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    evaluation = ("eval", "--run", tmp_path / "run", "--prompts", "box", "--overlays", 0)
    assert samcache(*evaluation) == 0
    photographs.rename(tmp_path / "moved")
    assert samcache(*evaluation) == 1
    assert samcache(*evaluation, "--root", tmp_path / "moved") == 0


def test_another_top_under_the_same_encoder_is_not_taken_for_the_base(samcache, tmp_path, capsys):
    state = fixed_weights(size_of("tiny"))
    torch.save(state, tmp_path / "base.pth")
    assert samcache("train-full", *SHORT, "--adapter", "lora", "--checkpoint", "base.pth", "--out", "run") == 0
    state["prompt_encoder.point_embeddings.2.weight"] *= 3
    torch.save(state, tmp_path / "other.pth")
    assert samcache("export", "--run", "run", "--checkpoint", "other.pth") == 1
    assert "prompt encoder or mask decoder is not the one" in capsys.readouterr().err
    assert samcache("export", "--run", "run") == 0


def test_a_run_stopped_before_its_first_evaluation_says_so(samcache, capsys):
    assert samcache("train-full", *SCENES, "--steps", 2, "--held-out", 0, "--out", "run") == 0
    assert "nothing held out to score" in capsys.readouterr().err


@pytest.mark.parametrize("options", [("--best-by", "iou/none"), ("--trackers", "tensorbored"), ("--train", "")])
def test_a_wrong_name_leaves_no_run_folder(samcache, tmp_path, options):
    assert samcache("train-full", *SHORT, *options, "--out", "run") == 2
    assert not (tmp_path / "run").exists()
