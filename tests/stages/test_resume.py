"""Stop or kill a training anywhere: it goes on as if nothing had happened."""

import signal

import pytest
import torch

from sam_cache.training import RunFolder

# Three steps an epoch and no checkpoint at every step, so that going on starts within an epoch and repeats steps.
COMMON = ("--batch-size", 3, "--max-objects", 3, "--warmup", 2, "--learning-rate", 1e-3, "--held-out", 0.25,
          "--seed", 4, "--steps", 6, "--evaluate-every", 3, "--save-every", 2, "--pictures", 0,
          "--trackers", "")  # fmt: skip


def top_command(scenes) -> tuple:
    return ("train-top", "--store", scenes, *COMMON)


FULL = ("train-full", "--dataset", "synthetic", "--scenes", 12, "--model", "tiny", "--adapter", "lora",
        "--augment", "hflip,jitter:0.5-2.0,colour", "--corrections", 1, *COMMON)  # fmt: skip


# Options of embed and of train-top. With views an epoch draws one for each image, so it is as many steps.
EMBED = {"train-top": (), "hq": ("--levels", "neck,early"), "views": ("--views", "identity,hflip,lsj:2")}
TRAIN = {"hq": ("--head", "hq", "--prompts", "box,noise-mask")}


@pytest.fixture(scope="module", params=[*EMBED, "train-full"])
def command(request, scenes_with) -> tuple:
    if request.param == "train-full":
        return FULL
    return (*top_command(scenes_with(*EMBED[request.param])), *TRAIN.get(request.param, ()))


@pytest.fixture(scope="module")
def straight(launch_in, command, tmp_path_factory) -> RunFolder:
    """The command in one process that nobody stopped."""
    launch = launch_in(tmp_path_factory.mktemp("straight"))
    assert launch.train(command, "run") == [0]
    return RunFolder.open(launch.folder / "run")


def stop(number: int, after_step: int, rank: int = 0) -> dict:
    return {"name": "send_signal", "rank": rank, "number": int(number), "after_step": after_step}


def logged(run: RunFolder) -> list[dict]:
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in run.metrics()]


def assert_equal(straight: RunFolder, other: RunFolder) -> None:
    """Bit for bit: what was logged, both checkpoints, the optimizer, and how far it all is."""
    assert logged(straight) == logged(other)
    (_, optimizer, state), (_, other_optimizer, other_state) = straight.load_training(), other.load_training()
    assert state == other_state
    assert optimizer["param_groups"] == other_optimizer["param_groups"]
    assert optimizer["state"].keys() == other_optimizer["state"].keys()
    for number, moments in optimizer["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, other_optimizer["state"][number][name])
    for which in ("last", "best"):
        assert (straight.path / which).read_text() == (other.path / which).read_text()
        weights, other_weights = straight.load_weights(which), other.load_weights(which)
        assert weights.keys() == other_weights.keys()
        assert all(torch.equal(value, other_weights[name]) for name, value in weights.items())


def steps_saved(run: RunFolder) -> int:
    return run.load_training()[2]["progress"]["step"]


@pytest.mark.slow
def test_stopped_twice_is_uninterrupted(launch, command, straight):
    parts = RunFolder(launch.folder / "parts")
    (ended,) = launch(*command, "--out", "parts", faults=[stop(signal.SIGTERM, 1)])
    assert ended.code == 130
    assert "stopped at step 1 of 6; go on with --out parts --resume" in ended.said
    assert steps_saved(parts) == 1
    assert launch.train(command, "parts", faults=[stop(signal.SIGINT, 4)]) == [130]
    assert steps_saved(parts) == 5
    assert launch.train(command, "parts") == [0]
    assert_equal(straight, parts)


@pytest.mark.slow
def test_killed_at_any_step_and_twice_in_a_row_is_uninterrupted(launch, command, straight):
    """First before there is a checkpoint, then twice in a row after the same one, and while a line was logged."""
    killed = RunFolder(launch.folder / "killed")
    for after_step, kept in ((1, 0), (3, 2), (1, 2)):
        assert launch.train(command, "killed", faults=[stop(signal.SIGKILL, after_step)]) == [-signal.SIGKILL]
        assert killed.resumable == (kept > 0)
        assert not kept or steps_saved(killed) == kept
    with open(killed.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    assert launch.train(command, "killed") == [0]
    assert_equal(straight, killed)


@pytest.mark.slow
def test_killed_anywhere_while_writing_is_uninterrupted(launch, scenes):
    """Dead at the n-th time that something must be on disk: configuration, checkpoint, what names it."""
    command = (*top_command(scenes), "--evaluate-every", 1)
    whole, killed = RunFolder(launch.folder / "whole"), RunFolder(launch.folder / "killed")
    assert launch.train(command, "whole") == [0]
    # In record.json, in config.json, between `last` and `best`, in a checkpoint's files, between its
    # renaming and `last`, in the files of a second one.
    for number in (2, 4, 9, 5, 7, 13):
        fault = {"name": "die_at_sync", "rank": 0, "number": number}
        assert launch.train(command, "killed", faults=[fault]) == [-signal.SIGKILL]
        if killed.resumable:
            assert killed.load_weights("last")
    assert launch.train(command, "killed") == [0]
    assert_equal(whole, killed)


@pytest.mark.slow
def test_killed_between_naming_last_and_best_keeps_the_best(launch, scenes):
    """With weights that hardly move the first of all evaluations stays the best."""
    command = (*top_command(scenes), "--learning-rate", 1e-30, "--weight-decay", 0, "--evaluate-every", 1)
    fault = {"name": "die_between", "rank": 0, "first": "last", "second": "best"}
    assert launch.train(command, "killed", faults=[fault]) == [-signal.SIGKILL]
    killed = RunFolder(launch.folder / "killed")
    assert steps_saved(killed) == 1
    assert not (killed.path / "best").exists()
    assert launch.train(command, "killed") == [0]
    assert (killed.path / "best").read_text() == "step-000001\n"
    assert killed.load_weights("best")


@pytest.mark.slow
def test_one_rank_of_two_is_stopped_or_killed_and_all_end(launch, scenes):
    """Going on with as many is going on bit for bit."""
    command = top_command(scenes)
    whole, parts = RunFolder(launch.folder / "whole"), RunFolder(launch.folder / "parts")
    assert launch.train(command, "whole", ranks=2) == [0, 0]
    assert launch.train(command, "parts", ranks=2, faults=[stop(signal.SIGTERM, 1, rank=1)]) == [130, 130]
    assert steps_saved(parts) == 1
    first, second = launch.train(command, "parts", ranks=2, faults=[stop(signal.SIGKILL, 2, rank=1)])
    assert first not in (0, -signal.SIGALRM)  # it did not wait for ever
    assert second == -signal.SIGKILL
    assert launch.train(command, "parts", ranks=2) == [0, 0]
    assert_equal(whole, parts)


@pytest.mark.slow
def test_another_number_of_ranks_goes_on_in_the_same_order(launch, command, straight):
    """Two ranks, then one, then three: the losses are those of one process that was never stopped."""
    parts = RunFolder(launch.folder / "parts")
    assert launch.train(command, "parts", ranks=2, faults=[stop(signal.SIGTERM, 2, rank=1)]) == [130, 130]
    assert launch.train(command, "parts", ranks=1, faults=[stop(signal.SIGTERM, 2)]) == [130]
    assert launch.train(command, "parts", ranks=3) == [0, 0, 0]
    assert [line["step"] for line in parts.metrics()] == [1, 2, 3, 4, 5, 6]
    for line, same in zip(logged(straight), logged(parts), strict=True):
        for name in ("loss", "focal", "dice", "iou", "gradient_norm", "learning_rate"):
            assert same[name] == pytest.approx(line[name], rel=1e-5)
    assert straight.load_training()[2]["batches"] == parts.load_training()[2]["batches"]
