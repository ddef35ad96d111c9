import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sam_cache.errors import CheckpointError, UsageError
from sam_cache.training.checkpoint import Progress, load, save, trained_parameters
from sam_cache.training.run_folder import RunFolder

# Few distinct values, so that ties and repetitions are common.
scores = st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=1, max_size=12)


def note_all(values, progress=None):
    """Note one value a step; returns the progress and what each call said."""
    progress = progress or Progress()
    said = []
    for value in values:
        progress.step += 1
        said.append(progress.note({"score": value, "other": -value}, "score"))
    return progress, said


@given(scores)
def test_best_is_the_first_of_the_highest(values):
    progress, said = note_all(values)
    assert progress.best == max(values)
    assert progress.best_step == values.index(max(values)) + 1
    assert progress.since_best == len(values) - progress.best_step
    assert said == [all(value > earlier for earlier in values[:place]) for place, value in enumerate(values)]


@given(scores, st.integers(1, 5))
def test_patience_ends_after_as_many_evaluations_without_a_better_one(values, patience):
    progress, ends = Progress(), []
    for value in values:
        note_all([value], progress)
        ends.append(progress.exhausted(patience))
    for place in range(len(values)):
        recent = values[max(0, place + 1 - patience) : place + 1]
        before = values[: max(0, place + 1 - patience)]
        assert ends[place] == (bool(before) and max(recent) <= max(before))
        assert not progress.exhausted(None)


def test_other_metrics_can_decide():
    progress = Progress(step=5)
    assert progress.note({"score": 0.5, "boundary_iou/box": 0.25}, "boundary_iou/box")
    assert progress.best == 0.25
    progress.step = 6
    assert not progress.note({"score": 0.9, "boundary_iou/box": 0.2}, "boundary_iou/box")
    assert progress.best_step == 5


def test_nothing_held_out_makes_the_last_step_the_best():
    progress = Progress()
    for step in (10, 20, 30):
        progress.step = step
        assert progress.note({}, "score")
        assert (progress.best, progress.best_step) == (None, step)
        assert not progress.exhausted(1)


def test_a_score_that_is_not_a_number_never_beats_one_nor_stays_unbeaten():
    progress, said = note_all([float("nan"), 0.5, float("nan"), 0.6])
    assert said == [True, True, False, True]
    assert progress.best == 0.6


def test_unknown_metric_names_the_known_ones():
    progress = Progress(step=3)
    with pytest.raises(UsageError, match=r"--best-by dice: .* use iou/box, score"):
        progress.note({"score": 0.5, "iou/box": 0.5}, "dice")
    assert progress == Progress(step=3)


def train_a_step(network, optimizer):
    optimizer.zero_grad()
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()


def new_network():
    torch.manual_seed(3)
    network = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    network[0].requires_grad_(False)
    return network, torch.optim.AdamW(network[1].parameters(), lr=0.1)


@pytest.fixture
def saved(tmp_path):
    run = RunFolder.create(tmp_path)
    run.write_json("config.json", {})
    network, optimizer = new_network()
    train_a_step(network, optimizer)
    progress = Progress(step=7, best=0.5, best_step=4, since_best=3)
    save(network, {"epoch": 1, "position": 2}, optimizer, run, progress, best=True)
    return network, optimizer, run, progress


def test_progress_weights_and_optimizer_come_back_whole(saved):
    network, optimizer, run, progress = saved
    again, its_optimizer = new_network()
    assert load(again, its_optimizer, run) == (progress, {"epoch": 1, "position": 2})
    assert set(trained_parameters(again)) == {"1.weight", "1.bias"}
    train_a_step(network, optimizer)
    train_a_step(again, its_optimizer)
    for name, value in trained_parameters(network).items():
        assert torch.equal(trained_parameters(again)[name], value)


@given(scores, scores, st.integers(1, 3))
def test_patience_goes_on_where_it_was(before, after, patience):
    """Through JSON, as a checkpoint keeps it."""
    straight, _ = note_all(before + after)
    resumed, _ = note_all(after, Progress(**json.loads(json.dumps(vars(note_all(before)[0])))))
    assert resumed == straight
    assert resumed.exhausted(patience) == straight.exhausted(patience)


def test_a_checkpoint_from_before_patience_still_loads(saved):
    _, _, run, _ = saved
    (file,) = run.path.glob("checkpoints/*/state.json")
    state = json.loads(file.read_text())
    del state["progress"]["since_best"]
    file.write_text(json.dumps(state))
    progress, _ = load(*new_network(), run)
    assert progress == Progress(step=7, best=0.5, best_step=4, since_best=0)


def test_other_trained_parameters_are_another_run(saved):
    _, _, run, _ = saved
    network, optimizer = new_network()
    network[0].requires_grad_(True)
    with pytest.raises(CheckpointError, match="0.bias is trained in one run and frozen in the other; keep --train"):
        load(network, optimizer, run)
