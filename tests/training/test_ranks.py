"""What two processes tell one another through gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sam_cache.training.ranks import agree, any_rank, gather, is_alone, same_parameters, sum_gradients, sum_over_ranks

RANKS = range(2)


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> list[dict]:
    """What each of two ranks was told."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, str(Path(__file__).with_name("two_ranks.py")), str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in RANKS]


def test_two_processes_are_not_alone(told):
    assert [found["alone"] for found in told] == [False, False]


def test_sums_are_the_same_on_all_ranks_and_a_name_may_be_missing_on_some(told):
    for found in told:
        assert found["sums"] == {"both": 0.1 + 1.1, "first": 2.5, "second": 2.5}
        assert found["sums_of_one"] == {"loss": 3.0}


def test_what_one_rank_decides_all_do(told):
    assert [found["any"] for found in told] == [[False, True, True]] * 2


def test_everything_is_gathered_by_rank(told):
    assert [found["gathered"] for found in told] == [[{"rank": 0, "rows": []}, {"rank": 1, "rows": [0]}]] * 2


def test_the_first_rank_has_the_say_and_its_errors_are_raised_everywhere(told):
    for found in told:
        assert found["agreed"] == "said by 0"
        assert found["error"] == ["UsageError", "--out: taken"]


def test_gradients_are_summed_and_a_missing_one_counts_as_zeros(told):
    for found in told:
        assert found["gradients"]["both"] == [[3.0] * 3] * 2
        assert found["gradients"]["one"] == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


def test_a_gradient_that_no_rank_has_stays_missing_as_in_one_process(told):
    """AdamW would let weights decay whose gradient is zero, and leaves those alone that have none."""
    for found in told:
        assert found["gradients"]["none"] is None
        assert found["gradients"]["frozen"] is None


def test_ranks_that_start_from_other_weights_are_told_which(told):
    assert [found["weights"]["same"] for found in told] == [None, None]
    for rank, found in enumerate(told):
        assert f"rank {1 - rank} has other weights than this one, first bias" in found["weights"]["other"]


def test_one_process_talks_to_itself():
    network = nn.Linear(2, 2)
    network.bias.grad = torch.ones(2)
    sum_gradients(network)
    same_parameters(network)
    assert network.weight.grad is None
    assert network.bias.grad.tolist() == [1, 1]
    assert is_alone()
    assert sum_over_ranks({"loss": 0.3}, torch.device("cpu")) == {"loss": 0.3}
    assert (any_rank(True, torch.device("cpu")), any_rank(False, torch.device("cpu"))) == (True, False)
    assert (gather(5), agree(6)) == ([5], 6)
