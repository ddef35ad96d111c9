"""Interactive rounds: clicks where a mask errs, with the mask itself given back (Kirillov et al. 2023, app. A)."""

from dataclasses import replace

import pytest
import torch

from sam_cache.model import load_top
from sam_cache.stages.decoding import SamObjective, correct, decode_batch
from sam_cache.training import LossWeights
from sam_cache.types import Batch, Prompts, Targets

CELLS = 32  # of the tiny model's masks, four input pixels each


def make_batch(masks: torch.Tensor, boxes: bool = True) -> Batch:
    """One prompt for each of `masks` (P, h, w), two images; half of them a point, or all boxes."""
    count = len(masks)
    has_box = torch.arange(count) % 2 == 0 if not boxes else torch.ones(count, dtype=torch.bool)
    prompts = Prompts(
        image_index=torch.arange(count) % 2,
        kind=torch.zeros(count, dtype=torch.long),
        points_xy_input=torch.rand(int((~has_box).sum()), 2) * 128,
        labels=torch.ones(int((~has_box).sum()), dtype=torch.long),
        offsets=torch.cat([torch.zeros(1, dtype=torch.long), (~has_box).long().cumsum(0)]),
        boxes_xyxy_input=torch.tensor([[10.0, 20, 90, 100]]).repeat(count, 1),
        has_box=has_box,
        has_mask=torch.zeros(count, dtype=torch.bool),
        chance=torch.rand(count, 2),
    )
    targets = Targets(masks, torch.ones(2, CELLS, CELLS), 1 + torch.rand(count))
    levels = {"neck": torch.randn(2, 32, 8, 8)}
    return Batch(levels, prompts, targets, torch.arange(2).numpy(), torch.arange(count).numpy())


def squares(*corners: tuple[int, int, int]) -> torch.Tensor:
    masks = torch.zeros(len(corners), CELLS, CELLS)
    for mask, (top, left, side) in zip(masks, corners, strict=True):
        mask[top : top + side, left : left + side] = 1
    return masks


def click_of(prompts: Prompts, p: int) -> tuple[int, int, int]:
    """Row and column of the cell clicked last, and the label."""
    x, y = ((prompts.points_xy_input[prompts.offsets[p + 1] - 1] + 0.5) / 4).tolist()
    return int(y), int(x), int(prompts.labels[prompts.offsets[p + 1] - 1])


@pytest.mark.parametrize("seed", range(5))
def test_clicks_lie_where_the_mask_is_wrong(seed):
    torch.manual_seed(seed)
    batch = make_batch(squares((4, 4, 10), (10, 12, 6), (0, 0, 32), (20, 20, 5)), boxes=False)
    logits = torch.randn(4, CELLS, CELLS)
    found = correct(batch.prompts, logits, batch.targets, 4.0, 1, 1)
    assert torch.equal(found.offsets.diff(), batch.prompts.offsets.diff() + 1)
    for p in range(4):
        row, column, label = click_of(found, p)
        assert (logits[p, row, column] > 0) != (batch.targets.masks[p, row, column] >= 0.5)
        assert label == int(batch.targets.masks[p, row, column] >= 0.5)
        kept = found.select(torch.tensor([p])).points_xy_input[:-1]
        assert torch.equal(kept, batch.prompts.select(torch.tensor([p])).points_xy_input)
    assert torch.equal(found.masks, logits)
    assert not found.ambiguous.any()


def test_masks_that_were_given_make_way_for_the_network_s_own():
    torch.manual_seed(1)
    batch = make_batch(squares((4, 4, 10), (10, 12, 6), (0, 0, 30), (20, 20, 5)), boxes=False)
    plain = batch.prompts
    has_mask = torch.tensor([True, False, False, True])
    given = replace(plain, has_mask=has_mask, masks=10 * has_mask[:, None, None] * (2 * batch.targets.masks - 1))
    logits = torch.randn(4, CELLS, CELLS)
    found, expected = (correct(prompts, logits, batch.targets, 4.0, 1, 1) for prompts in (given, plain))
    torch.testing.assert_close(vars(found), vars(expected), rtol=0, atol=0)
    assert found.has_mask.all()
    assert torch.equal(found.masks, logits)


def test_all_wrong_cells_are_reached_and_equally_often():
    """A mask that is wrong in 16 cells: over chances spread evenly every one is clicked equally often."""
    many = 1600
    batch = make_batch(squares((8, 8, 4)).repeat(many, 1, 1))
    chance = torch.stack([(torch.arange(many) + 0.5) / many, torch.zeros(many)], dim=1)
    found = correct(replace(batch.prompts, chance=chance), -torch.ones(many, CELLS, CELLS), batch.targets, 4.0, 1, 1)
    clicks = torch.tensor([click_of(found, p)[:2] for p in range(many)])
    cells, counts = clicks.unique(dim=0, return_counts=True)
    assert len(cells) == 16
    assert counts.min() >= 98
    assert counts.max() <= 102


def test_padding_is_never_clicked():
    batch = make_batch(squares((0, 0, 4), (0, 0, 4)))
    batch.targets.valid[:, 16:] = 0
    logits = torch.ones(2, CELLS, CELLS)  # wrong nearly everywhere, below as well
    for turn in range(1, 40):
        found = correct(batch.prompts, logits, batch.targets, 4.0, turn, 1000)
        assert all(click_of(found, p)[0] < 16 for p in range(2) if found.offsets.diff()[p])


def test_a_perfect_mask_is_clicked_on_the_object_and_an_empty_one_not_at_all():
    batch = make_batch(squares((4, 4, 8), (0, 0, 0)))
    logits = torch.where(batch.targets.masks > 0, 1.0, -1.0)
    found = correct(batch.prompts, logits, batch.targets, 4.0, 1, 1)
    assert found.offsets.diff().tolist() == [1, 0]
    row, column, label = click_of(found, 0)
    assert batch.targets.masks[0, row, column] == label == 1


def test_the_last_of_several_rounds_and_one_by_chance_bring_no_click():
    batch = make_batch(squares((4, 4, 8)).repeat(200, 1, 1))
    logits = -torch.ones(200, CELLS, CELLS)
    clicks = torch.stack(
        [correct(batch.prompts, logits, batch.targets, 4.0, turn, 10).offsets.diff() for turn in range(1, 11)]
    )
    assert (clicks[-1] == 0).all()
    assert (clicks[:-1].sum(0) == 8).all()  # SAM: 8 clicks and 2 rounds without one
    assert (clicks[:-1] == 0).any(1).all()  # which one, differs from object to object


def test_clicks_do_not_depend_on_the_batch():
    batch = make_batch(squares((4, 4, 10), (10, 12, 6), (1, 1, 9)), boxes=False)
    logits = torch.randn(3, CELLS, CELLS)
    whole = correct(batch.prompts, logits, batch.targets, 4.0, 2, 3)
    index = torch.tensor([2])
    part = batch.select(index)
    alone = correct(part.prompts, logits[index], part.targets, 4.0, 2, 3)
    assert click_of(whole, 2) == click_of(alone, 0)


def test_rounds_are_averaged_and_the_first_is_the_step_without_corrections():
    top = load_top("tiny")
    batch = make_batch(squares((4, 4, 10), (10, 12, 6), (0, 0, 30), (20, 20, 5)), boxes=False)
    (plain,) = SamObjective(LossWeights())(top, batch)
    rounds = [
        {name: float(value.detach()) for name, value in losses.items()}
        for losses in SamObjective(LossWeights(), corrections=3)(top, batch)
    ]
    assert len(rounds) == 4
    for name, value in plain.items():
        assert 4 * rounds[0][name] == pytest.approx(float(value.detach()), rel=1e-6)
    assert rounds[1]["loss"] != rounds[0]["loss"]


def test_each_round_is_given_the_masks_of_the_one_before():
    top = load_top("tiny")
    batch = make_batch(squares((4, 4, 10), (10, 12, 6)))
    first = next(iter(decode_batch(top, batch)))[2].logits[:, 0]
    second = replace(batch, prompts=correct(batch.prompts, first.detach(), batch.targets, 4.0, 1, 1))
    expected = next(SamObjective(LossWeights())(top, second))
    _, found = SamObjective(LossWeights(), corrections=1)(top, batch)
    assert float(found["loss"].detach()) == pytest.approx(float(expected["loss"].detach()) / 2, rel=1e-5)
