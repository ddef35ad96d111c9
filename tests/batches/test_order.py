import hashlib
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sam_cache.batches.order import Cursor, Order, Visit
from sam_cache.batches.split import is_held_out
from sam_cache.ranks import Ranks

ROWS = np.arange(10, 21)


def batches(count, *, order=None, start=Cursor(), ranks=Ranks()):
    return list(islice((order or Order(ROWS, seed=3)).batches(4, start, ranks), count))


def test_an_epoch_holds_every_row_once():
    found = batches(6)
    for epoch in (0, 1):
        seen = [visit for cursor, visits in found if cursor.epoch == epoch for visit in visits]
        assert sorted(visit.row for visit in seen) == sorted(ROWS)
        assert seen == Order(ROWS, 3).epoch(epoch)
    assert [visit.row for visit in Order(ROWS, 3).epoch(0)] != [visit.row for visit in Order(ROWS, 3).epoch(1)]


def test_restarting_at_any_cursor_continues_the_same_stream():
    whole = batches(9)
    for number, (cursor, _) in enumerate(whole[:-1]):
        assert batches(len(whole) - number - 1, start=cursor) == whole[number + 1 :]


@pytest.mark.parametrize("world", [2, 3, 5])
def test_ranks_share_the_batches_of_one_process(world):
    """Also where a rank gets nothing, and from any cursor: the number of ranks may change in between."""
    whole = batches(6)
    shares = [batches(6, ranks=Ranks(rank, world)) for rank in range(world)]
    for step, (cursor, visits) in enumerate(whole):
        assert {share[step][0] for share in shares} == {cursor}
        parts = [share[step][1] for share in shares]
        assert sorted(visit.row for part in parts for visit in part) == sorted(visit.row for visit in visits)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert batches(3, start=whole[2][0], ranks=Ranks(1, world)) == shares[1][3:]


def test_rows_come_as_often_as_they_should():
    """Whole numbers exactly in every epoch, a fraction as a chance."""
    order = Order(ROWS, 0, np.array([2.0, 0.0, 1.5] + [1.0] * 8))
    counts = np.zeros((200, 21), int)
    for epoch in range(200):
        visits = order.epoch(epoch)
        for visit in visits:
            counts[epoch, visit.row] += 1
        assert len({(visit.row, visit.number) for visit in visits}) == len(visits)
    assert (counts[:, 10] == 2).all()
    assert (counts[:, 11] == 0).all()
    assert 1.35 < counts[:, 12].mean() < 1.65
    assert (counts[:, 13:] == 1).all()
    assert len(order) == 12  # 11.5, rounded


def test_every_visit_has_a_key_of_its_own():
    keys = {Visit(0, epoch, number).key for epoch in range(50) for number in range(50)}
    assert len(keys) == 2500
    assert Visit(5, 7).key == 7


def test_held_out_images_are_few_stable_and_decided_by_id():
    ids = np.arange(1000)
    held_out = is_held_out(ids, [""] * 1000, 0.1, seed=0)
    assert 60 < held_out.sum() < 140
    assert np.array_equal(held_out[:500], is_held_out(ids[:500], [""] * 500, 0.1, seed=0))
    assert not np.array_equal(held_out, is_held_out(ids, [""] * 1000, 0.1, seed=1))
    assert not is_held_out(ids, [""] * 1000, 0.0, seed=0).any()


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, unique=True), st.integers(0, 2**40), st.floats(0.01, 0.9))
def test_who_is_held_out_is_the_hash_of_earlier_versions(ids, seed, fraction):
    digests = [hashlib.blake2b(f"{seed}/{each}".encode(), digest_size=8).digest() for each in ids]
    expected = [int.from_bytes(digest, "little") / 2**64 < fraction for digest in digests]
    found = is_held_out(np.array(ids), [""] * len(ids), fraction, seed)
    assert found.tolist() == expected or (not any(expected) and found.sum() == (len(ids) > 1))


def test_few_images_still_hold_one_out():
    assert is_held_out(np.arange(3), [""] * 3, 0.1, seed=0).sum() == 1


def test_a_named_split_decides():
    assert is_held_out(np.arange(3), ["train2017", "val2017", "train2017"], 0.5, seed=0).tolist() == [
        False,
        True,
        False,
    ]


# Image 0 has two plain views and two tiles, image 1 one view and three tiles, image 2 tiles alone, image 3 one view.
LOOKS = np.array([(0, 0), (0, 1), (0, 9), (0, 9), (1, 1), (1, 9), (1, 9), (1, 9), (2, 9), (2, 9), (3, 5)])


def test_the_order_is_that_of_earlier_versions():
    """Where rows are images, runs that were started before there were views go on the same."""
    assert [visit.row for visit in Order(ROWS, 3).epoch(1)] == [17, 14, 20, 11, 12, 15, 19, 10, 18, 16, 13]
    repeats = np.array([2.0, 0.0, 1.5] + [1.0] * 8)
    assert [(visit.row, visit.number) for visit in Order(ROWS, 3, repeats).epoch(5)] == [
        (20, 0), (16, 0), (18, 0), (17, 0), (19, 0), (12, 1), (13, 0), (10, 1), (10, 0), (14, 0), (12, 0), (15, 0)
    ]  # fmt: skip


def test_an_epoch_looks_once_at_each_image_and_at_all_its_tiles():
    order = Order(ROWS, 3, looks=LOOKS)
    seen = []
    for epoch in range(300):
        rows = [visit.row for visit in order.epoch(epoch)]
        assert len(set(rows)) == len(rows)
        places = sorted(row - 10 for row in rows)
        drawn = {tuple(pair) for pair in LOOKS[places].tolist()}
        assert sorted(image for image, _ in drawn) == [0, 1, 2, 3]
        assert places == [place for place, pair in enumerate(LOOKS.tolist()) if tuple(pair) in drawn]
        seen += drawn
    counts = [seen.count(tuple(pair)) for pair in np.unique(LOOKS, axis=0).tolist()]
    assert all(70 < count < 130 for count in counts[:3])  # of image 0: a third each
    assert all(120 < count < 180 for count in counts[3:5])
    assert counts[5:] == [300, 300]
    assert len(order) == round(4 / 3 + 2 + 2 + 1)


def test_images_are_told_apart_whatever_their_numbers_and_order():
    shuffled = np.random.default_rng(0).permutation(len(ROWS))
    looks = LOOKS[shuffled] * [1000, 7] + [5, 3]
    rows = {visit.row for visit in Order(ROWS[shuffled], 0, looks=looks).epoch(0)}
    assert {LOOKS[row - 10, 0] for row in rows} == {0, 1, 2, 3}
    assert rows == {visit.row for visit in Order(ROWS[shuffled], 0, looks=LOOKS[shuffled]).epoch(0)}


@given(st.integers(0, 9), st.integers(0, 2**32), st.booleans())
def test_turns_are_what_visiting_row_by_row_gives(epoch, seed, looking):
    """The plain way: a list of all visits, shuffled."""
    repeats = np.array([2.0, 0.0, 1.5] + [1.0] * 8)
    order = Order(ROWS, seed, repeats, LOOKS if looking else None)
    random = np.random.default_rng((seed, epoch))
    turns = np.floor(repeats + random.random(len(ROWS)))
    if looking:
        kinds = {image: sorted(set(LOOKS[LOOKS[:, 0] == image, 1])) for image in range(4)}
        drawn = [kind[int(chance * len(kind))] for kind, chance in zip(kinds.values(), random.random(4), strict=True)]
        turns *= LOOKS[:, 1] == np.array(drawn)[LOOKS[:, 0]]
    visits = [Visit(row, epoch, number) for row, count in zip(ROWS, turns, strict=True) for number in range(int(count))]
    assert order.epoch(epoch) == [visits[place] for place in random.permutation(len(visits))]


def test_a_row_that_is_drawn_comes_as_often_as_it_should():
    order = Order(ROWS, 3, np.full(len(ROWS), 3.0), LOOKS)
    assert len(order) == 19  # three times 6 1/3
    visits = order.epoch(0)
    assert len(visits) == 3 * len({visit.row for visit in visits})


def test_looks_restart_at_any_cursor_and_are_shared_by_ranks():
    order = Order(ROWS, 3, looks=LOOKS)
    whole = batches(9, order=order)
    for number, (cursor, _) in enumerate(whole[:-1]):
        assert batches(len(whole) - number - 1, order=order, start=cursor) == whole[number + 1 :]
    shares = [batches(9, order=order, ranks=Ranks(rank, 2)) for rank in range(2)]
    for step, (_, visits) in enumerate(whole):
        assert sorted(visit.row for share in shares for visit in share[step][1]) == sorted(v.row for v in visits)
