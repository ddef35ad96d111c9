"""Prompts that are masks, on their way from a dataset's images to a batch."""

import numpy as np
import pytest
import torch

from sam_cache.batches import LiveImages, Preprocessing, Sampling, Visit
from sam_cache.batches.live import collate
from sam_cache.data import KINDS, open_dataset, parse_augmentation, parse_prompts

HOW, CELLS = Preprocessing(128), 32


@pytest.fixture(scope="module")
def scenes():
    return open_dataset("synthetic", count=4, size=160)


def read(scenes, text, *, epoch=0, augmentation="none", rows=range(4), training=True):
    sampling = Sampling(parse_prompts(text), seed=0, training=training)
    images = LiveImages(scenes, HOW, CELLS, sampling, parse_augmentation(augmentation))
    return [images.read(Visit(row, epoch)) for row in rows]


@pytest.mark.parametrize("augmentation", ["none", "hflip:1,jitter:0.5-2.0"])
def test_noise_masks_are_those_of_the_targets_but_for_their_outline(scenes, augmentation):
    batch = collate(read(scenes, "noise-mask", augmentation=augmentation))
    prompts, targets = batch.prompts, batch.targets.masks
    assert prompts.masks.shape == targets.shape
    assert (prompts.masks[prompts.has_mask].abs() == 10).all()
    for p in prompts.has_mask.nonzero()[:, 0].tolist():
        inside = torch.nn.functional.avg_pool2d(targets[p][None], 17, 1, 8, count_include_pad=False)[0]
        assert (prompts.masks[p][inside == 1] == 10).all()
        assert (prompts.masks[p][inside == 0] == -10).all()
    wrong = (prompts.masks > 0) != (targets > 0.5)
    assert 0 < wrong[prompts.has_mask].float().mean() < 0.3


def test_a_batch_joins_images_with_masks_and_without(scenes):
    examples = read(scenes, "noise-mask", rows=[0]) + read(scenes, "box", rows=[1]) + read(scenes, "point", rows=[2])
    batch = collate(examples)
    asked = [KINDS[kind] for kind in batch.prompts.kind.tolist()]
    assert batch.prompts.has_mask.tolist() == [kind == "noise-mask" for kind in asked]
    assert {"noise-mask", "box", "point"} <= set(asked)
    assert torch.equal(batch.prompts.masks[: len(examples[0].annotation.objects)], examples[0].annotation.prompts.masks)
    assert not batch.prompts.masks[~batch.prompts.has_mask].any()


def test_a_noise_mask_belongs_to_its_visit_and_is_the_same_in_evaluation(scenes):
    (first,), (again,), (later,), (scored,) = (
        read(scenes, "noise-mask", rows=[0], **how) for how in ({}, {}, {"epoch": 1}, {"training": False})
    )
    masks = first.annotation.prompts.masks
    assert torch.equal(masks, again.annotation.prompts.masks)
    assert torch.equal(masks, scored.annotation.prompts.masks)
    assert not torch.equal(masks, later.annotation.prompts.masks)


def test_the_same_objects_can_be_asked_for_by_mask_and_by_another_kind(scenes):
    """As evaluation does: an image read once is asked about by one kind after the other."""
    mixture = parse_prompts("box,noise-mask")
    (example,) = read(scenes, str(mixture), rows=[1], training=False)
    box, mask = (example.asked(Sampling(kind, 0, False)).annotation for kind in mixture.kinds)
    assert np.array_equal(box.objects, mask.objects)
    assert box.prompts.masks is None
    assert mask.prompts.has_mask.any()
    assert torch.equal(box.targets.masks, mask.targets.masks)
