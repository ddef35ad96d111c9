import numpy as np
import pytest

from sam_cache.batches import is_held_out


def sides(*splits):
    return is_held_out(np.arange(len(splits)), splits, 0.0, seed=0).tolist()


def test_the_part_before_the_slash_decides_and_not_the_name_of_the_set():
    assert sides("train/ecssd-test", "train/DIS", "val/DIS-TR") == [False, False, True]


def test_sets_to_train_on_alone_name_nobody_to_hold_out():
    assert sides("train/a-val", "train/test") == [False, False]


@pytest.mark.parametrize("split", ["val", "val2017", "test-dev", "MyVal", "Val/a"])
def test_plain_names_decide_as_they_are(split):
    assert sides("train", split, "") == [False, True, False]
