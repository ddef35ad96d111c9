"""Several sets of images and masks through the commands: one store, and scores of each set."""

import json

import cv2
import numpy as np
import pytest

from sam_cache.stages.sets import summarise_sets
from sam_cache.store import EmbeddingStore

SETS = ("--pairs", "a=a:a,b-test=b/im:b/gt", "--val-pairs", "v=v:v,w.1=w/im:w/gt")
PAIRS = ("--dataset", "pairs", "--root", "data", *SETS)
TINY = ("--model", "tiny", "--store", "s.zarr", "--shard-rows", 4)
ONE_STEP = ("--out", "run", "--steps", 1, "--prompts", "box", "--warmup", 0, "--evaluate-images", 1, "--pictures", 0)
COUNTS = {"a": 4, "b-test": 2, "v": 3, "w.1": 2}


@pytest.fixture
def data(tmp_path):
    """Sets of discs on noise: two to train on and two held out; in `a` and `v` images and masks share a folder."""
    generator = np.random.default_rng(0)
    folders = {"a": ("a", "a"), "b-test": ("b/im", "b/gt"), "v": ("v", "v"), "w.1": ("w/im", "w/gt")}
    for name, (images, masks) in folders.items():
        for folder in (images, masks):
            (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
        for number in range(COUNTS[name]):
            mask = np.zeros((48, 64), np.uint8)
            cv2.circle(mask, (24 + 5 * number, 22), 8 + 2 * number, 255, -1, cv2.LINE_AA)
            noise = generator.integers(0, 120, (48, 64, 3), dtype=np.uint8)
            cv2.imwrite(str(tmp_path / "data" / images / f"{number}.jpg"), noise + (mask // 2)[:, :, None])
            cv2.imwrite(str(tmp_path / "data" / masks / f"{number}.png"), mask)
    return tmp_path / "data"


def evaluate(samcache, tmp_path, *options):
    assert samcache("eval", *options, "--out", "eval", "--prompts", "box,centroid", "--overlays", 1) == 0
    return json.loads((tmp_path / "eval" / "report.json").read_text())


def test_embed_train_and_score_each_set(samcache, data, tmp_path, capsys, monkeypatch):
    assert samcache("embed", *PAIRS, *TINY) == 0
    store = EmbeddingStore.open(tmp_path / "s.zarr")
    splits = store.images.splits.tolist()
    assert {split: splits.count(split) for split in splits} == {
        "train/a": 4, "train/b-test": 2, "val/v": 3, "val/w.1": 2
    }  # fmt: skip
    assert samcache("train-top", "--store", "s.zarr", *ONE_STEP) == 0
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert (len(record["trained"]), len(record["held_out"])) == (6, 5)

    capsys.readouterr()
    report = evaluate(samcache, tmp_path, "--store", "s.zarr", "--run", "run")
    said, complaints = capsys.readouterr()
    assert "grey" not in complaints  # the overlay's image was found and read in its set
    assert list(report["sets"]) == ["v", "w.1"]
    for name, found in report["sets"].items():
        for kind in ("box", "centroid"):
            assert found["tuned"][kind]["images"] == found["tuned"][kind]["objects"] == COUNTS[name]
            for score in ("iou", "boundary_iou"):
                means = {what: found[what][kind][score]["mean"] for what in ("tuned", "untouched", "gain")}
                assert means["gain"] == pytest.approx(means["tuned"] - means["untouched"])
                assert 0 <= means["untouched"] <= 1
    for what in ("untouched", "tuned", "gain"):
        for score in ("iou", "boundary_iou"):
            by_set = [found[what]["box"][score]["mean"] for found in report["sets"].values()]
            assert report["mean_over_sets"][what]["box"][score] == pytest.approx(sum(by_set) / 2)
            whole = report[what]["box"]["all"][score]["mean"]
            assert whole == pytest.approx((3 * by_set[0] + 2 * by_set[1]) / 5)
    _, row = [line for line in said.splitlines() if " w.1 " in line]  # of box, then of centroid
    _, mean = [line for line in said.splitlines() if "mean over sets" in line]
    for line, found in ((row, report["sets"]["w.1"]), (mean, report["mean_over_sets"])):
        tuned = found["tuned"]["centroid"]["iou"]
        assert f"{tuned['mean'] if isinstance(tuned, dict) else tuned:.3f}" in line

    monkeypatch.chdir(tmp_path / "data")  # the store knows the folder of its images from anywhere
    everything = evaluate(samcache, tmp_path / "data", "--store", tmp_path / "s.zarr", "--rows", "all")
    assert {name: found["untouched"]["box"]["images"] for name, found in everything["sets"].items()} == COUNTS
    assert "tuned" not in everything["mean_over_sets"]
    assert "grey" not in capsys.readouterr().err


def test_train_full_and_its_evaluation_in_a_moved_folder(samcache, data, tmp_path):
    options = ("--adapter", "none", "--train", "decoder", "--model", "tiny", *ONE_STEP)
    assert samcache("train-full", *PAIRS, *options) == 0
    data.rename(tmp_path / "moved")
    report = evaluate(samcache, tmp_path, "--run", "run", "--root", tmp_path / "moved")
    assert report["data"] == "pairs train/a, train/b-test, val/v, val/w.1"
    assert {name: found["tuned"]["box"]["images"] for name, found in report["sets"].items()} == {"v": 3, "w.1": 2}
    assert set(report["mean_over_sets"]) == {"untouched", "tuned", "gain"}


def test_folders_given_without_a_root_are_found_from_elsewhere(samcache, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(data)
    assert samcache("embed", "--dataset", "pairs", *SETS, *TINY[:2], "--store", tmp_path / "s.zarr") == 0
    monkeypatch.chdir(tmp_path)
    evaluate(samcache, tmp_path, "--store", "s.zarr")
    assert "grey" not in capsys.readouterr().err


def test_a_dataset_without_sets_has_no_table_of_them(samcache, scenes, tmp_path, capsys):
    report = evaluate(samcache, tmp_path, "--store", scenes)
    assert "sets" not in report
    assert "mean_over_sets" not in report
    assert "by set" not in capsys.readouterr().out
    assert summarise_sets({}, {1: "", 2: ""}, 0) == {}


def test_masks_of_0_and_1_end_the_command_with_their_remedy(samcache, data, capsys):
    for file in (data / "w/gt").iterdir():
        cv2.imwrite(str(file), cv2.imread(str(file), cv2.IMREAD_GRAYSCALE) // 255)
    assert samcache("embed", *PAIRS, *TINY) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "data/w/gt: masks such as 0.png" in line
    assert "--mask-maximum 1" in line
    ones = ("--dataset", "pairs", "--root", "data", "--pairs", "w=w/im:w/gt")
    assert samcache("embed", *ones, *TINY, "--mask-maximum", 1) == 0
    assert "2 objects" in capsys.readouterr().err


def test_one_mask_of_0_and_1_is_skipped_and_said(samcache, data, capsys, tmp_path):
    file = data / "a/1.png"
    cv2.imwrite(str(file), cv2.imread(str(file), cv2.IMREAD_GRAYSCALE) // 255)
    assert samcache("embed", *PAIRS, *TINY) == 0
    assert "mask a/1.png: values 0 and 1 where 0 and 255 are meant" in capsys.readouterr().err
    assert len(EmbeddingStore.open(tmp_path / "s.zarr").objects()["row"]) == 10


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--split", "val"),
        ("--images", "images"),
        ("--annotations", "all.json"),
        ("--masks", "masks"),
        ("--objects-per", "component"),
        ("--classes", "3,4"),
        ("--ignore-values", "0"),
    ],
)
@pytest.mark.parametrize("command", ["embed", "train-full"])
def test_flags_of_other_formats_are_refused(samcache, data, tmp_path, capsys, command, flag, value):
    into = TINY if command == "embed" else ("--model", "tiny", *ONE_STEP)
    assert samcache(command, *PAIRS, *into, flag, value) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{flag} {value}: has no effect on --dataset pairs; leave it" in line
    assert not (tmp_path / "s.zarr").exists()
    assert not (tmp_path / "run").exists()


def test_a_store_of_a_few_images_of_each_set_grows_to_all(samcache, data, tmp_path):
    for options, counts in ((("--limit", 5), (2, 1, 1, 1)), ((), tuple(COUNTS.values()))):
        assert samcache("embed", *PAIRS, *TINY, *options) == 0
        splits = EmbeddingStore.open(tmp_path / "s.zarr").images.splits.tolist()
        kept = tuple(splits.count(split) for split in ("train/a", "train/b-test", "val/v", "val/w.1"))
        assert kept == counts
    assert samcache("verify", "--store", "s.zarr") == 0


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--dataset", "pairs"), 2, "say --pairs NAME=IMAGES:MASKS, such as"),
        (("--dataset", "pairs", "--pairs", "data/a:data/a"), 2, "--pairs 'data/a:data/a': write NAME=IMAGES:MASKS"),
        (("--dataset", "pairs", "--pairs", "x/y=a:a"), 2, "letters, digits"),
        (("--dataset", "pairs", "--pairs", "a=data/a:data/a", "--val-pairs", "a=data/v:data/v"), 2, "given twice"),
        (("--dataset", "pairs", "--pairs", "a=data/a:data/none"), 1, "data/none: no such folder; correct the path"),
        (
            ("--dataset", "coco", "--pairs", "a=data/a:data/a"),
            2,
            "--pairs a=data/a:data/a: is for --dataset pairs, not coco",
        ),
        (
            ("--dataset", "synthetic", "--val-pairs", "a=a:a,b=b:b"),
            2,
            "--val-pairs a=a:a,b=b:b: is for --dataset pairs",
        ),
        (("--dataset", "synthetic", "--mask-maximum", 1), 2, "--mask-maximum 1: is for --dataset pairs, not synthetic"),
        (("--dataset", "pairs", "--mask-maximum", "2"), 2, "mask-maximum"),
    ],
)
def test_misfits_are_one_line_with_their_remedy(samcache, data, capsys, options, code, words):
    assert samcache("embed", *options, *TINY) == code
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said
