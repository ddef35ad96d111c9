"""What a run has learnt, as a file that segment_anything loads."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from sam_cache.model import fit_trained, fixed_weights, size_of
from sam_cache.model.parts import outline
from sam_cache.stages import export
from sam_cache.store import EmbeddingStore
from sam_cache.training import RunFolder

SIZE = size_of("tiny")
QUICK = ("--steps", 1, "--warmup", 0, "--learning-rate", 3e-2, "--batch-size", 1, "--held-out", 0, "--prompts", "box",
         "--max-objects", 2)  # fmt: skip
FULL = ("--dataset", "synthetic", "--scenes", 2, "--model", "tiny")
RUNS = {
    "none": (),
    "lora": ("--adapter", "lora", "--train", "decoder"),
    "sa": ("--adapter", "sa"),
    "none-64": ("--input-size", 64),
    "lora-64": ("--adapter", "lora", "--input-size", 64, "--fit", "squash", "--normalise", "minmax"),
}


@pytest.fixture(scope="module")
def run_of(invoke, tmp_path_factory, scenes):
    """A run by name, made when it is first asked for: `top`, or one of `RUNS`. Read only."""
    folder = tmp_path_factory.mktemp("runs")

    def run_of(name):
        path = folder / name
        if not path.exists():
            stage = ("train-top", "--store", scenes) if name == "top" else ("train-full", *FULL, *RUNS[name])
            assert invoke(*stage, "--out", path, *QUICK) == 0
        return path

    return run_of


def load(path):
    return torch.load(path, weights_only=True)


def base():
    return fixed_weights(SIZE)


@pytest.mark.parametrize("name", ["top", "none", "lora"])
def test_the_file_is_the_base_with_what_was_trained_in_its_place(samcache, run_of, capsys, tmp_path, name):
    run = run_of(name)
    assert samcache("export", "--run", run, "--out", "deep/sam.pth") == 0
    assert "deep/sam.pth: loads in segment_anything; largest logit difference" in capsys.readouterr().out
    found, expected = load(tmp_path / "deep" / "sam.pth"), base()
    weights = RunFolder.open(run).load_weights("best")
    plain = {key.replace(".vit.", "."): value for key, value in weights.items() if "low_rank" not in key}
    assert plain
    expected |= plain
    if name == "lora":
        for block in range(SIZE.depth):
            at = f"blocks.{block}.attn.qkv"
            updates = []
            for target in "qkv":
                factors = [weights.get(f"image_encoder.vit.{at}.low_rank_{half}_{target}") for half in ("up", "down")]
                updates.append(torch.zeros(SIZE.width, SIZE.width) if target == "k" else factors[0] @ factors[1])
            assert torch.cat(updates).abs().max() > 0
            expected[f"image_encoder.{at}.weight"] += torch.cat(updates)
    assert list(found) == list(outline(SIZE).state_dict())
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-6, atol=1e-8, msg=key)
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["sam.pth"]


def test_the_file_is_a_checkpoint_to_go_on_from(samcache, run_of, tmp_path):
    """For samcache too: the next store is embedded by it, and holds its top."""
    assert samcache("export", "--run", run_of("none"), "--out", "sam.safetensors") == 0
    assert samcache("embed", *FULL, "--checkpoint", "sam.safetensors", "--store", "s.zarr") == 0
    exported = load_file(tmp_path / "sam.safetensors")
    assert exported.keys() == base().keys()
    top = EmbeddingStore.open(tmp_path / "s.zarr").base
    assert exported["mask_decoder.iou_token.weight"].numpy().tobytes() in top


@pytest.mark.parametrize("which", ["best", "last"])
def test_the_checkpoint_that_is_asked_for_is_taken(samcache, run_of, tmp_path, which):
    shutil.copytree(run_of("top"), tmp_path / "run")
    run = RunFolder.open(tmp_path / "run")
    best = run.load_weights("best")
    run.save(9, {name: 1.5 * value for name, value in best.items()}, {}, {}, best=False)
    assert samcache("export", "--run", "run", "--which", which, "--out", "sam.pth") == 0
    found = load(tmp_path / "sam.pth")
    assert all(torch.equal(found[name], value * (1.5 if which == "last" else 1.0)) for name, value in best.items())


def test_an_adapter_that_depends_on_the_image_is_a_usage_error(samcache, run_of, capsys, tmp_path):
    assert samcache("export", "--run", run_of("sa"), "--out", "sam.pth") == 2
    assert "cannot become plain weights" in capsys.readouterr().err
    assert not list(tmp_path.glob("*sam*"))


def test_tables_that_were_not_trained_stay_the_model_s_own(samcache, run_of, capsys, tmp_path):
    assert samcache("export", "--run", run_of("lora-64"), "--out", "sam.pth") == 0
    said = capsys.readouterr().err
    assert "trained with input_size 64, fit squash, normalise minmax; segment_anything has input_size 128" in said
    assert "stretched" not in said
    found, expected = load(tmp_path / "sam.pth"), base()
    tables = [key for key in expected if "pos" in key.split(".")[-1] and key.startswith("image_encoder.")]
    assert len(tables) == 1 + 2 * SIZE.depth
    assert all(torch.equal(found[key], expected[key]) for key in tables)


def test_tables_that_were_trained_are_stretched_back(samcache, run_of, capsys, tmp_path):
    assert samcache("export", "--run", run_of("none-64"), "--out", "sam.pth") == 0
    assert "trained for input size 64, are stretched back to 128, which is not exact" in capsys.readouterr().err
    found = load(tmp_path / "sam.pth")
    weights = RunFolder.open(run_of("none-64")).load_weights("best")
    assert weights["image_encoder.vit.pos_embed"].shape[1] == 4
    fitted = fit_trained(weights, SIZE)
    for key, value in fitted.items():
        assert torch.equal(found[key.replace(".vit.", ".")], value), key


def test_a_top_without_its_store_takes_the_rest_from_the_checkpoint(samcache, run_of, capsys, tmp_path):
    shutil.copytree(run_of("top"), tmp_path / "run")
    assert samcache("export", "--run", "run", "--out", "with.pth") == 0
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    (tmp_path / "run" / "record.json").write_text(json.dumps(record | {"store": str(tmp_path / "gone.zarr")}))
    assert samcache("export", "--run", "run", "--out", "without.pth") == 0
    assert "gone.zarr: no longer there" in capsys.readouterr().err
    first, second = load(tmp_path / "with.pth"), load(tmp_path / "without.pth")
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", ["top", "none"])
def test_a_checkpoint_of_another_encoder_is_refused(samcache, run_of, capsys, tmp_path, name):
    other = fixed_weights(SIZE, seed=1)
    torch.save(other, tmp_path / "other.pth")
    assert samcache("export", "--run", run_of(name), "--checkpoint", "other.pth", "--out", "sam.pth") == 1
    said = capsys.readouterr().err
    assert "other.pth: its encoder is not the one" in said
    assert "--checkpoint" in said
    assert not (tmp_path / "sam.pth").exists()
    torch.save(base(), tmp_path / "right.pth")
    assert samcache("export", "--run", run_of(name), "--checkpoint", "right.pth", "--out", "sam.pth") == 0


def test_where_segment_anything_answers_otherwise_the_old_file_stays(samcache, run_of, monkeypatch, capsys, tmp_path):
    """A network that was merged wrongly, as an error here would have it."""
    (tmp_path / "sam.pth").write_text("the old one")
    true = export.official_state
    key = "mask_decoder.output_upscaling.3.weight"
    monkeypatch.setattr(export, "official_state", lambda sam: (state := true(sam)) | {key: -state[key]})
    assert samcache("export", "--run", run_of("top"), "--out", "sam.pth") == 1
    assert "not written, segment_anything answers otherwise" in capsys.readouterr().err
    assert (tmp_path / "sam.pth").read_text() == "the old one"
    assert [file.name for file in tmp_path.iterdir()] == ["sam.pth"]


@pytest.mark.parametrize(("arguments", "code", "words"), [
    (("--out", "sam.onnx"), 2, "name it *.pth or *.safetensors"),
    (("--run", "nowhere"), 1, "no run there"),
    (("--format", "onnx"), 2, "onnx"),
])  # fmt: skip
def test_what_makes_no_sense_is_one_line(samcache, run_of, capsys, arguments, code, words):
    assert samcache("export", "--run", run_of("top"), *arguments) == code
    assert words in capsys.readouterr().err
