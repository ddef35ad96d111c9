"""The table of storage types and codecs for one's own images, with the tiny model."""

import json
import os
from pathlib import Path

import pytest

from sam_cache.config import CalibrateConfig
from sam_cache.stages import calibrate as stage
from sam_cache.stages import calibration, training
from sam_cache.stages.calibration import smallest_under, verdict
from sam_cache.stages.codec_trial import CANDIDATES, CODECS
from sam_cache.store import EmbeddingStore

COMMAND = ("calibrate", "--model", "tiny", "--dataset", "synthetic", "--scenes", 6, "--steps", 2, "--seeds", 2,
           "--batch-size", 2, "--prompts", "box", "--learning-rate", 1e-2, "--held-out", 0.4)  # fmt: skip
NAMES = ("fp32", "fp16", "bf16", "int8", "fp16 keep 7", "fp16 keep 5", "fp16 keep 3")


def read(out: Path) -> dict:
    return json.loads((out / "calibration.json").read_text())


def failing(*arguments: object, **options: object) -> None:
    raise AssertionError("this was done before")


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Neither waiting for the disk nor drawing the curves of so many short runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(training, "draw_curves", lambda metrics, path: None)
        yield


@pytest.fixture(scope="module")
def made(invoke, tmp_path_factory) -> Path:
    """A finished calibration. Read only."""
    out = tmp_path_factory.mktemp("calibrate") / "c"
    assert invoke(*COMMAND, "--out", out) == 0
    return out


@pytest.fixture
def copy(made, tmp_path) -> Path:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "calibration.json").write_bytes((made / "calibration.json").read_bytes())
    return tmp_path / "c"


def test_every_type_and_codec_has_its_row(made):
    report = read(made)
    table = {(row["values"], row["codec"]): row for row in report["table"]}
    assert len(table) == len(report["table"]) == 21
    assert table.keys() == {(name, codec) for name in NAMES for codec in CODECS}
    assert [row["bytes_per_row"] for row in report["table"]] == sorted(row["bytes_per_row"] for row in table.values())
    assert report["shape"] == [32, 8, 8]
    for row in table.values():
        assert row["write_mb_per_s"] > 0
        assert row["read_mb_per_s"] > 0
        assert row["times_smaller"] == 4 * 32 * 8 * 8 / row["bytes_per_row"]
    errors = {name: table[name, "raw"]["error"] for name in NAMES}
    assert errors["fp32"] == 0 < errors["fp16"] < errors["bf16"] < errors["int8"]
    assert errors["fp16"] < errors["fp16 keep 7"] < errors["fp16 keep 5"] < errors["fp16 keep 3"] < 0.1
    assert all(table[name, codec]["error"] == errors[name] for name in NAMES for codec in CODECS)
    assert table["fp16 keep 3", "zstd"]["flags"] == "--dtype fp16 --keep-bits 3 --codec zstd"
    assert table["fp32", "raw"]["flags"] == "--dtype fp32"


def test_losses_are_against_fp32_with_the_same_seed(made):
    report = read(made)
    scores = report["scores"]
    assert scores.keys() == {f"{name} {seed}" for name in NAMES for seed in (0, 1)}
    assert scores["fp32 0"]["iou"] != scores["fp32 1"]["iou"]
    assert len({scores[f"{name} 0"]["iou"] for name in NAMES}) > 3
    for row in report["table"]:
        name = row["values"]
        for score in ("iou", "boundary_iou"):
            expected = sum(scores[f"fp32 {seed}"][score] - scores[f"{name} {seed}"][score] for seed in (0, 1)) / 2
            assert row[f"{score}_loss"] == pytest.approx(expected, abs=1e-12)
        assert row["iou_loss"] == 0 or name != "fp32"
        assert row["within_noise"] == (row["iou_loss"] <= report["seed_noise"]["iou"])
    difference = scores["fp32 0"]["iou"] - scores["fp32 1"]["iou"]
    assert report["seed_noise"]["iou"] == pytest.approx(abs(difference) / 2**0.5)


def test_the_codec_named_is_the_smallest_under_the_bound(made):
    report = read(made)
    chosen = report["chosen"]
    under = [row for row in report["table"] if row["iou_loss"] <= 0.005]
    assert chosen["iou_loss"] <= 0.005
    assert chosen["bytes_per_row"] == min(row["bytes_per_row"] for row in under)


def test_only_the_exact_rows_and_the_table_are_left(made):
    assert {path.name for path in made.iterdir()} == {"calibration.json", "exact.zarr"}
    assert EmbeddingStore.open(made / "exact.zarr").spec.levels["neck"].dtype == "fp32"


def test_the_same_command_again_does_nothing_again(samcache, copy, monkeypatch, capsys):
    for name in ("embed", "try_codec", "train_top"):
        monkeypatch.setattr(stage, name, failing)
    before = read(copy)
    assert samcache(*COMMAND, "--out", copy) == 0
    assert read(copy) == before
    said = capsys.readouterr().out
    assert said.count("fp16 keep") >= 9
    assert "smallest under --bound 0.005: " in said
    assert f"samcache embed {before['chosen']['flags']}" in said
    assert samcache(*COMMAND, "--out", copy, "--json") == 0
    assert json.loads(capsys.readouterr().out) == before


def test_an_interrupted_one_goes_on_where_it_was(samcache, made, tmp_path, monkeypatch):
    few = CANDIDATES[:4:3]  # fp32 and int8
    for module in (stage, calibration):
        monkeypatch.setattr(module, "CANDIDATES", few)
    names = [f"{values.name} {seed}" for values in few for seed in (0, 1)]
    whole, done = {name: read(made)["scores"][name] for name in names}, []
    train = stage.train_top

    def stop_after(count: int):
        def counting(cfg) -> int:
            if len(done) == count:
                raise KeyboardInterrupt
            done.append((cfg.out.name, cfg.resume))
            return train(cfg)

        return counting

    for stops in (1, 3):
        monkeypatch.setattr(stage, "train_top", stop_after(stops))
        assert samcache(*COMMAND, "--out", tmp_path / "c") == 130
    assert samcache(*COMMAND[:-2], "--held-out", 0.5, "--out", tmp_path / "c") == 2
    monkeypatch.setattr(stage, "try_codec", failing)
    monkeypatch.setattr(stage, "train_top", stop_after(99))
    assert samcache(*COMMAND, "--out", tmp_path / "c") == 0
    assert len(done) == len({name for name, _ in done}) == 4
    assert read(tmp_path / "c")["scores"] == whole


def lose(out: Path, **losses: float) -> dict:
    """A calibration in which every type but fp32 scores so much less, .2 if nothing is said."""
    content = read(out)
    for name in NAMES[1:]:
        for seed in (0, 1):
            fp32 = content["scores"][f"fp32 {seed}"]["iou"]
            content["scores"][f"{name} {seed}"]["iou"] = fp32 - losses.get(name, 0.2)
    (out / "calibration.json").write_text(json.dumps(content))
    return content


def test_a_bound_that_nothing_meets_is_told(samcache, copy, capsys):
    lose(copy, int8=0.1)
    assert samcache(*COMMAND, "--out", copy, "--bound", 0.05) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "nothing but fp32 stays under --bound 0.05: the least loss is 0.1000, that of int8" in said
    assert read(copy)["chosen"]["values"] == "fp32"


def test_the_bound_decides(samcache, copy, capsys):
    lose(copy, int8=0.01, bf16=0.001)
    for bound, name in ((0.005, "bf16"), (0.011, "bf16"), (0.3, "fp16 keep 3")):
        assert samcache(*COMMAND, "--out", copy, "--bound", bound) == 0
        chosen = read(copy)["chosen"]
        assert chosen["bytes_per_row"] <= min(r["bytes_per_row"] for r in read(copy)["table"] if r["values"] == name)
        assert chosen["iou_loss"] <= bound
        assert f"it loses {chosen['iou_loss']:.4f} mean IoU" in " ".join(capsys.readouterr().out.split())


def test_the_smallest_of_none_is_none():
    assert smallest_under([], 1.0) is None
    rows = [{"iou_loss": 0.2, "bytes_per_row": 1}, {"iou_loss": -0.1, "bytes_per_row": 9}]
    assert smallest_under(rows, 0.1) is rows[1]
    assert smallest_under(rows, -1) is None


def test_one_seed_knows_no_noise(samcache, copy):
    assert samcache(*COMMAND, "--seeds", 1, "--out", copy) == 0
    report = read(copy)
    assert report["seed_noise"] == {"iou": None, "boundary_iou": None}
    assert {row["within_noise"] for row in report["table"]} == {None}
    assert "one seed does not tell" in verdict(report)


def test_a_type_that_cannot_hold_the_images_is_left_out(copy, samcache, monkeypatch, capsys):
    content = read(copy)
    content["codecs"] = {name: found for name, found in content["codecs"].items() if not name.startswith("fp16 ")}
    content["scores"] = {name: found for name, found in content["scores"].items() if not name.startswith("fp16 ")}
    (copy / "calibration.json").write_text(json.dumps(content))
    tried = stage.try_codec

    def too_large(exact, given, values, *rest):
        return tried(exact, given * 1e6, values, *rest)

    monkeypatch.setattr(stage, "try_codec", too_large)
    monkeypatch.setattr(stage, "train_top", failing)
    assert samcache(*COMMAND, "--out", copy) == 0
    assert {row["values"] for row in read(copy)["table"]} == {"fp32", "bf16", "int8"}
    assert "fp16: left out, 6 images have values that it cannot hold" in capsys.readouterr().out


def test_several_processes_are_refused(samcache, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert samcache(*COMMAND) == 2
    assert "WORLD_SIZE=2" in capsys.readouterr().err


def test_the_defaults_stand():
    cfg = CalibrateConfig()
    assert (cfg.seeds, cfg.bound, cfg.limit) == (3, 0.005, 200)
    assert [values.name for values in CANDIDATES] == list(NAMES)
