"""Batches read live: an exact place, augmentation that never leaves nothing, and bad images that stop nothing."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from sam_cache.batches import Cursor, LiveBatches, LiveImages, Order, Preprocessing, Sampling, Visit
from sam_cache.data import Augmentation, open_dataset, parse_augmentation, parse_prompts, rle_to_mask
from sam_cache.errors import DatasetError, ImageError
from sam_cache.ranks import Ranks

HOW = Preprocessing(128)
SAMPLING = Sampling(parse_prompts("box,point,centroid"), seed=0, training=True, max_objects=3)


@pytest.fixture(scope="module")
def scenes():
    return open_dataset("synthetic", count=6, size=160)


def make_batches(dataset, *, augmentation="none", threads=1, cursor=None, ranks=Ranks()):
    images = LiveImages(dataset, HOW, 32, SAMPLING, parse_augmentation(augmentation))
    order = Order(np.arange(len(dataset.images)), seed=0)
    return LiveBatches(images, order, batch_size=4, ranks=ranks, threads=threads, cursor=cursor)


def same(one, other) -> bool:
    return (
        np.array_equal(one.rows, other.rows)
        and np.array_equal(one.objects, other.objects)
        and torch.equal(one.pixels, other.pixels)
        and torch.equal(one.targets.masks, other.targets.masks)
        and torch.equal(one.prompts.points_xy_input, other.prompts.points_xy_input)
        and torch.equal(one.prompts.boxes_xyxy_input, other.prompts.boxes_xyxy_input)
    )


@pytest.mark.parametrize("augmentation", ["none", "hflip,vflip,rotate90,jitter,colour"])
def test_going_on_from_any_place_gives_the_same_batches(scenes, augmentation):
    stream = make_batches(scenes, augmentation=augmentation)
    whole, places = [], []
    for batch in islice(stream, 5):
        whole.append(batch)
        places.append(stream.state())
    for number, place in enumerate(places[:-1]):
        rest = make_batches(scenes, augmentation=augmentation, cursor=Cursor(**place), threads=3)
        for found, expected in zip(islice(rest, 2), whole[number + 1 :], strict=False):
            assert same(found, expected)


def test_ranks_together_see_the_batches_of_one(scenes):
    whole = list(islice(make_batches(scenes), 3))
    shares = [list(islice(make_batches(scenes, ranks=Ranks(rank, 3)), 3)) for rank in range(3)]
    for step, batch in enumerate(whole):
        parts = [share[step] for share in shares if share[step] is not None]
        rows = [row for part in parts for row in part.rows.tolist()]
        assert sorted(rows) == sorted(batch.rows.tolist())
        for part in parts:
            for place, row in enumerate(part.rows.tolist()):
                assert torch.equal(part.pixels[place], batch.pixels[batch.rows.tolist().index(row)])
    assert shares[2][1] is None  # the second batch of an epoch of six images holds two


def test_an_augmentation_that_loses_everything_is_drawn_again(scenes):
    """Scaled down a hundred times, masks of this size vanish: the image is then taken as it is."""
    vanishing = Augmentation(jitter=(0.0001, 0.0002))
    example = LiveImages(scenes, HOW, 32, SAMPLING, vanishing).read(Visit(0))
    plain = LiveImages(scenes, HOW, 32, SAMPLING).read(Visit(0))
    assert example.annotation.objects.tolist() == plain.annotation.objects.tolist()
    assert np.array_equal(example.pixels, plain.pixels)


def test_boxes_fit_the_moved_masks(scenes):
    images = LiveImages(scenes, HOW, 32, replace(SAMPLING, mixture=parse_prompts("box"), training=False),
                        parse_augmentation("hflip:1,jitter:0.5-2.0"))  # fmt: skip
    for epoch in range(6):
        example = images.read(Visit(1, epoch))
        boxes = example.geometry.boxes_to_image(example.annotation.prompts.boxes_xyxy_input.numpy())
        for box, rle in zip(boxes, example.columns["rle"], strict=True):
            rows, columns = np.nonzero(rle_to_mask(rle, example.geometry.height, example.geometry.width))
            tight = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert box == pytest.approx(tight, abs=1e-3)


def test_prompts_are_those_of_the_cached_path_without_augmentation(scenes):
    """Chance is keyed by image and object, so an image asks the same whichever path it comes by."""
    images = LiveImages(scenes, HOW, 32, SAMPLING)
    one, other = (images.read(Visit(2, epoch)) for epoch in (0, 1))
    assert one.image_id == scenes.images[2].id
    assert torch.equal(images.read(Visit(2, 0)).annotation.prompts.chance, one.annotation.prompts.chance)
    assert not torch.equal(one.annotation.prompts.chance, other.annotation.prompts.chance)


def broken(dataset, rows):
    def read(record):
        if record.id in rows:
            raise ImageError(f"{record.path}: damaged")
        return dataset.read(record)

    return replace(dataset, read=read)


def test_images_that_cannot_be_read_are_noted_and_left_out(scenes):
    stream = make_batches(broken(scenes, {1, 4}))
    seen = [row for batch in islice(stream, 4) if batch is not None for row in batch.rows.tolist()]
    assert sorted(set(seen)) == [0, 2, 3, 5]
    assert {row: text.split(": ")[1] for row, text in stream._images.problems.items()} == {1: "damaged", 4: "damaged"}


def test_a_dataset_of_which_nothing_can_be_used_is_an_error_and_no_endless_loop(scenes):
    with pytest.raises(DatasetError, match="none of .* images can be trained on; the first problem: .*damaged"):
        list(islice(make_batches(broken(scenes, set(range(6)))), 10))
