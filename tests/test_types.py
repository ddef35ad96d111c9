"""Prompts of which some have a mask, through everything that takes a batch apart and puts one together."""

from dataclasses import replace

import pytest
import torch

from sam_cache.types import Prompts

SIDE = 4


def draw(kinds: str, seed: int = 0) -> Prompts:
    """Prompts about one image by a letter each: p one point, t two points, b a box, m a mask, c a click on a mask."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor([{"p": 1, "t": 2, "c": 1}.get(kind, 0) for kind in kinds], dtype=torch.long)
    has_mask = torch.tensor([kind in "mc" for kind in kinds], dtype=torch.bool)
    masks = torch.randn(len(kinds), SIDE, SIDE, generator=generator) * has_mask[:, None, None]
    return Prompts(
        image_index=torch.zeros(len(kinds), dtype=torch.long),
        kind=torch.arange(len(kinds)),
        points_xy_input=torch.rand(int(counts.sum()), 2, generator=generator),
        labels=torch.ones(int(counts.sum()), dtype=torch.long),
        offsets=torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)]),
        boxes_xyxy_input=torch.rand(len(kinds), 4, generator=generator),
        has_box=torch.tensor([kind == "b" for kind in kinds], dtype=torch.bool),
        has_mask=has_mask,
        chance=torch.rand(len(kinds), 2, generator=generator),
        masks=masks if has_mask.any() else None,
    )


def assert_same(one: Prompts, other: Prompts) -> None:
    torch.testing.assert_close(vars(one), vars(other), rtol=0, atol=0)


@pytest.mark.parametrize("kinds", [("pm", "bb"), ("tb", "mp", ""), ("", "cmb"), ("mm", "m")])
def test_what_is_joined_can_be_selected_again(kinds):
    parts = [draw(each, seed) for seed, each in enumerate(kinds)]
    joined = Prompts.join(parts)
    assert joined.masks.shape == (sum(map(len, kinds)), SIDE, SIDE)
    assert joined.has_mask.tolist() == [kind in "mc" for kind in "".join(kinds)]
    assert not joined.masks[~joined.has_mask].any()
    for image, part in enumerate(parts):
        found = joined.select((joined.image_index == image).nonzero()[:, 0])
        masks = torch.zeros(len(part), SIDE, SIDE) if part.masks is None else part.masks
        assert_same(found, replace(part, image_index=torch.full_like(part.image_index, image), masks=masks))


def test_prompts_without_masks_are_joined_without():
    joined = Prompts.join([draw("pb"), draw(""), draw("tt")])
    assert joined.masks is None
    assert not joined.has_mask.any()


def test_masks_are_selected_in_any_order_and_number():
    prompts = draw("pmbct")
    index = torch.tensor([3, 0, 1, 1])
    found = prompts.select(index)
    assert found.has_mask.tolist() == [True, False, True, True]
    assert torch.equal(found.masks, prompts.masks[index])
    assert found.offsets.diff().tolist() == [1, 1, 0, 0]


def test_one_point_is_ambiguous_unless_a_mask_says_more():
    assert draw("ptbmc").ambiguous.tolist() == [True, False, False, False, False]


def test_corrections_give_every_prompt_a_mask():
    prompts = draw("pmb")
    logits, clicked = torch.randn(3, SIDE, SIDE), torch.tensor([True, False, True])
    found = prompts.corrected(torch.rand(3, 2), torch.zeros(3, dtype=torch.long), clicked, logits)
    assert found.has_mask.all()
    assert torch.equal(found.masks, logits)
    assert found.offsets.diff().tolist() == [2, 0, 1]
    assert found.has_box.tolist() == [False, False, True]
