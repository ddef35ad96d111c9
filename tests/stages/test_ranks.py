"""Training in several processes is training in one, and what goes wrong in one of them stops all."""

import os
import subprocess
import sys
from itertools import islice

import pytest
import torch

from sam_cache.batches import CachedBatches, Order, Sampling
from sam_cache.data import parse_prompts
from sam_cache.model import SIZES
from sam_cache.model.weights import fresh_head
from sam_cache.ranks import Ranks
from sam_cache.stages.cached_data import CachedData
from sam_cache.training import RunFolder
from sam_cache.types import Batch

QUIET = ("--pictures", 0, "--trackers", "")
RATE = 1e-3
COMMON = ("--max-objects", 3, "--mask-budget", 4, "--warmup", 1, "--learning-rate", RATE, "--held-out", 0.25,
          "--seed", 4, *QUIET)  # fmt: skip


@pytest.fixture(params=["train-top", "train-full"])
def command(request, scenes) -> tuple:
    """Either training, of 9 and of 7 images, such that its last batch of an epoch holds only one."""
    return commands(scenes)[request.param]


def commands(scenes) -> dict[str, tuple]:
    return {
        "train-top": ("train-top", "--store", scenes, "--batch-size", 4, *COMMON),
        "train-full": ("train-full", "--dataset", "synthetic", "--scenes", 10, "--model", "tiny", "--batch-size", 3,
                       "--threads", 1, *COMMON),
    }  # fmt: skip


def logged(run: RunFolder) -> list[dict]:
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in run.metrics()]


def assert_same_training(one: RunFolder, other: RunFolder) -> None:
    """Up to the order in which fp32 numbers are summed."""
    for line, same in zip(logged(one), logged(other), strict=True):
        assert line.keys() == same.keys()
        for name, value in line.items():
            # A pixel of a mask may fall to the other side of its edge, and the IoU with it.
            tolerance = 1e-3 if name.startswith("held_out") else 1e-5
            assert same[name] == pytest.approx(value, rel=tolerance, abs=1e-6), name
    (weights, optimizer, _), (same_weights, same_optimizer, _) = one.load_training(), other.load_training()
    assert optimizer["state"].keys() == same_optimizer["state"].keys()
    for name, value in weights.items():
        # The same number added to the bias of all keys is nothing to a softmax: its gradient is rounding
        # alone, and Adam makes steps of that as of any other.
        tolerance = 0.1 * RATE if name.endswith(("k_proj.bias", "qkv.bias")) else 0.02 * RATE
        assert torch.allclose(value, same_weights[name], rtol=1e-5, atol=tolerance), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("--prompts", "point,box,none", "--corrections", 1),
        ("--prompts", "box", "--accumulation", 2),  # nothing has a gradient for the embeddings of points
    ],
)
def test_two_ranks_are_one(launch, command, options):
    """Shares of a batch are unequal, and of the third one, which is a single image, one is empty."""
    train_in_one_and_two(launch, *command, *options)


def train_in_one_and_two(launch, *command) -> RunFolder:
    """Four steps, the same in one process and in two; returns the run of two."""
    for ranks in (1, 2):
        ended = launch(*command, "--steps", 4, "--evaluate-every", 2, "--out", ranks, ranks=ranks)
        assert [process.code for process in ended] == [0] * ranks, ended
    one, two = (RunFolder.open(launch.folder / ranks) for ranks in "12")
    assert [line["step"] for line in two.metrics()] == [1, 2, 3, 4]
    assert_same_training(one, two)
    return two


@pytest.mark.slow
@pytest.mark.parametrize("loss", [("focal-dice",), ("uncertain-points", "--iou-weight", 0)])  # the second is HQ-SAM's
def test_two_ranks_train_the_hq_head_as_one_does(launch, scenes_with, loss):
    """The rank without an image has no gradient for the layers that see the image alone either."""
    command = commands(scenes_with("--levels", "neck,early"))["train-top"]
    run = train_in_one_and_two(launch, *command, "--head", "hq", "--prompts", "box,noise-mask", "--loss", *loss)
    assert set(run.load_weights("last")) == set(fresh_head(SIZES["tiny"]))
    assert {"held_out/iou/box", "held_out/iou/noise-mask"} <= run.metrics()[-1].keys()


VIEWS = "identity,hflip,lsj:2"


@pytest.mark.slow
def test_two_ranks_train_on_views_as_one_does(launch, scenes_with):
    """A view that one rank draws is drawn by the other: together they look at each image once in an epoch."""
    train_in_one_and_two(launch, *commands(scenes_with("--views", VIEWS))["train-top"], "--prompts", "box")


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_views_that_one_process_draws(scenes_with, world):
    """And ask about them with the same prompts, over two epochs."""
    data = CachedData.open(scenes_with("--views", VIEWS), annotations=None, partial=False, held_out=0.25, seed=4)
    sampling = Sampling(parse_prompts("box,point"), seed=4, training=True, max_objects=3)
    annotator = data.annotator(SIZES["tiny"].mask_size, sampling)
    steps = 2 * 3  # of 4, 4 and 1 images

    def draw(ranks: Ranks) -> list:
        order = Order(data.train, 4, looks=data.looks(data.train))
        batches = CachedBatches(data.store, annotator, order, batch_size=4, ranks=ranks, keep=steps)
        return list(islice(batches, steps))

    whole, shares = draw(Ranks()), [draw(Ranks(rank, world)) for rank in range(world)]
    seen = []
    for step, batch in enumerate(whole):
        parts = [share[step] for share in shares]
        rows = [row for part in parts if part is not None for row in part.rows.tolist()]
        assert sorted(rows) == sorted(batch.rows.tolist())
        asked = [prompts_by_row(part) for part in parts if part is not None]
        assert {row: prompt for part in asked for row, prompt in part.items()} == prompts_by_row(batch)
        seen += rows
    images, views = data.store.images.ids, data.store.images.views
    for epoch in (seen[: len(seen) // 2], seen[len(seen) // 2 :]):
        assert sorted(images[epoch].tolist()) == sorted(set(images[data.train].tolist()))
    assert len(set(views[seen].tolist())) > 2
    assert any(part is None for share in shares for part in share)


def prompts_by_row(batch: Batch) -> dict[int, list]:
    """What is asked about each row, and where it is right."""
    prompts, found = batch.prompts, {row: [] for row in batch.rows.tolist()}
    for place, image in enumerate(prompts.image_index.tolist()):
        points = prompts.points_xy_input[prompts.offsets[place] : prompts.offsets[place + 1]]
        numbers = (prompts.kind[place], points, prompts.boxes_xyxy_input[place], prompts.chance[place],
                   batch.targets.masks[place].sum())  # fmt: skip
        found[int(batch.rows[image])].append([number.tolist() for number in numbers])
    return found


@pytest.mark.slow
def test_scores_do_not_depend_on_the_number_of_ranks(launch, scenes, tmp_path):
    """To the last bit, of weights that hardly move: no image counts twice, and none is left out."""
    command = (*commands(scenes)["train-top"], "--learning-rate", 1e-30, "--weight-decay", 0, "--steps", 1)
    found = {}
    for images, ranks in ((3, 1), (3, 2), (1, 1), (1, 2)):
        name = f"{images}-{ranks}"
        ended = launch(*command, "--evaluate-images", images, "--out", name, ranks=ranks)
        assert [process.code for process in ended] == [0] * ranks, ended
        line = RunFolder.open(tmp_path / name).metrics()[0]
        found[images, ranks] = {name: value for name, value in line.items() if name.startswith("held_out/")}
    assert found[3, 1] == found[3, 2]
    assert found[1, 1] == found[1, 2]
    assert "held_out/iou/box" in found[3, 1]
    assert found[3, 1] != found[1, 1]


@pytest.mark.slow
def test_only_the_first_rank_writes(launch, scenes, tmp_path):
    faults = tuple({"name": "note_writes", "rank": rank} for rank in (0, 1))
    command = commands(scenes)["train-top"][: -len(QUIET)]  # with pictures and TensorBoard
    ended = launch(*command, "--steps", 2, "--evaluate-every", 1, "--out", "run", ranks=2, faults=faults)
    assert [process.code for process in ended] == [0, 0], ended
    first, second = (
        [line for line in process.said.splitlines() if line.startswith("wrote ") and "run" in line] for process in ended
    )
    for name in ("metrics.jsonl", "config.json", "checkpoints", "tensorboard", "curves.png"):
        assert any(name in line for line in first), name
    assert second == []
    assert [line["step"] for line in RunFolder.open(tmp_path / "run").metrics()] == [1, 2]


def test_more_ranks_than_images_in_a_batch_are_refused(launch, scenes):
    for process in launch(*commands(scenes)["train-top"], "--batch-size", 1, "--out", "run", ranks=2):
        assert process.code == 2
        assert "WORLD_SIZE=2: --batch-size 1 counts all processes together" in process.said
        assert "give --batch-size 2 or more, or start fewer" in process.said


def test_ranks_that_start_from_other_weights_are_refused(launch, scenes, tmp_path):
    faults = ({"name": "start_from_other_weights", "rank": 1},)
    for rank, process in enumerate(
        launch(*commands(scenes)["train-top"], "--steps", 1, "--out", "run", ranks=2, faults=faults)
    ):
        assert process.code == 1
        assert f"rank {1 - rank} has other weights than this one, first mask_decoder.iou_token.weight" in process.said
    assert not RunFolder.open(tmp_path / "run").resumable


@pytest.mark.slow
def test_what_the_first_rank_cannot_do_ends_all(launch, scenes, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    for process in launch(*commands(scenes)["train-top"], "--steps", 1, "--out", "run", ranks=2):
        assert process.code == 2
        assert "already holds a run; add --resume" in process.said


@pytest.mark.slow
def test_a_loss_that_is_not_a_number_on_one_rank_stops_all(launch, command, tmp_path):
    """The last checkpoint stays, and the error names the images of the whole batch."""
    faults = ({"name": "break_loss", "rank": 1, "at_batch": 2},)
    options = ("--steps", 4, "--save-every", 1, "--mask-budget", 64, "--out", "run")
    ended = launch(*command, *options, ranks=2, faults=faults)
    run = RunFolder.open(tmp_path / "run")
    for process in ended:
        assert process.code == 1
        named = set(process.said.split("step 2: loss is nan on images ")[1].split("; lower")[0].split(", "))
        assert len(named) == int(command[command.index("--batch-size") + 1])
        assert named <= set(run.read_json("record.json")["trained"])
        assert "lower --learning-rate or use --precision fp32; run keeps step 1" in process.said
    weights, _, state = run.load_training()
    assert state["progress"]["step"] == 1
    assert all(value.isfinite().all() for value in weights.values())
    assert [line["step"] for line in run.metrics()] == [1]


@pytest.mark.slow
def test_a_learning_rate_that_is_far_too_high_is_an_error(launch, scenes, tmp_path):
    command = (*commands(scenes)["train-top"], "--learning-rate", 1e30, "--steps", 4, "--out", "run")
    for process in launch(*command, "--evaluate-every", 4, ranks=2):
        assert process.code == 1
        assert "lower --learning-rate" in process.said
        assert "nothing had been saved yet" in process.said
    assert not RunFolder.open(tmp_path / "run").resumable


@pytest.mark.slow
def test_torchrun_starts_a_training(scenes, tmp_path):
    command = [*commands(scenes)["train-top"], "--steps", 2, "--evaluate-every", 2, "--out", "run"]
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sam_cache",
         *map(str, command)],
        cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    run = RunFolder.open(tmp_path / "run")
    assert [line["step"] for line in run.metrics()] == [1, 2]
    assert run.load_weights()
    assert ended.stderr.count("best checkpoint at step 2") == 1
