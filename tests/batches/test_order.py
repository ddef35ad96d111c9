from itertools import islice

import numpy as np

from sam_cache.batches.order import Cursor, endless_batches, shuffled
from sam_cache.batches.split import is_held_out

ROWS = np.arange(10, 21)


def test_an_epoch_holds_every_row_once():
    batches = list(islice(endless_batches(ROWS, 4, seed=3, start=Cursor()), 6))
    for epoch in (0, 1):
        seen = np.concatenate([rows for cursor, rows in batches if cursor.epoch == epoch])
        assert sorted(seen) == sorted(ROWS)
        assert np.array_equal(seen, shuffled(ROWS, 3, epoch))
    assert not np.array_equal(shuffled(ROWS, 3, 0), shuffled(ROWS, 3, 1))


def test_restarting_at_any_cursor_continues_the_same_stream():
    whole = list(islice(endless_batches(ROWS, 4, seed=3, start=Cursor()), 9))
    for number, (cursor, _) in enumerate(whole[:-1]):
        rest = islice(endless_batches(ROWS, 4, seed=3, start=cursor), len(whole) - number - 1)
        for (_, expected), (_, found) in zip(whole[number + 1 :], rest, strict=True):
            assert np.array_equal(expected, found)


def test_held_out_images_are_few_stable_and_decided_by_id():
    ids = np.arange(1000)
    held_out = is_held_out(ids, [""] * 1000, 0.1, seed=0)
    assert 60 < held_out.sum() < 140
    assert np.array_equal(held_out[:500], is_held_out(ids[:500], [""] * 500, 0.1, seed=0))
    assert not np.array_equal(held_out, is_held_out(ids, [""] * 1000, 0.1, seed=1))
    assert not is_held_out(ids, [""] * 1000, 0.0, seed=0).any()


def test_few_images_still_hold_one_out():
    assert is_held_out(np.arange(3), [""] * 3, 0.1, seed=0).sum() == 1


def test_a_named_split_decides():
    assert is_held_out(np.arange(3), ["train2017", "val2017", "train2017"], 0.5, seed=0).tolist() == [
        False,
        True,
        False,
    ]
