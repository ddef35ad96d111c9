import numpy as np
import pytest

from sam_cache.pictures import draw_overlay
from sam_cache.pictures.overlay import FILL, PALETTE


def scene(height=120, width=160):
    image = np.full((height, width, 3), 100, np.uint8)
    mask = np.zeros((height, width), bool)
    mask[30:80, 40:100] = True
    return image, mask


def test_fill_contour_and_surroundings():
    image, mask = scene()
    drawn = draw_overlay(image, [mask])
    assert (image == 100).all(), "the caller's image is left alone"
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8
    assert (drawn[~mask] == 100).all()
    assert (drawn[30, 40:100] == PALETTE[0]).all()
    assert (drawn[30:80, 99] == PALETTE[0]).all()
    inside = np.array([100, 100, 100]) * (1 - FILL) + np.array(PALETTE[0]) * FILL
    assert np.abs(drawn[40:70, 50:90] - inside).max() <= 0.5


def test_memory_order_and_empty_masks():
    image, mask = scene()
    expected = draw_overlay(image, [mask, np.zeros_like(mask)])
    assert np.array_equal(expected, draw_overlay(image, [np.asfortranarray(mask)]))


def test_colours_differ_and_repeat():
    image, _ = scene()
    masks = np.zeros((len(PALETTE) + 1, *image.shape[:2]), bool)
    for number, mask in enumerate(masks):
        mask[10:14, 15 * number : 15 * number + 10] = True
    drawn = draw_overlay(image, masks)
    edges = [tuple(drawn[10, 15 * number + 5].tolist()) for number in range(len(masks))]
    assert edges == [*PALETTE, PALETTE[0]]


@pytest.mark.parametrize("size", [None, 80, 640])
def test_prompts_fall_where_they_should(size):
    image, _ = scene()
    points = np.array([(20.0, 30.0), (120.0, 90.0)])
    drawn = draw_overlay(
        image,
        points_xy_image=points,
        labels=np.array([1, 0]),
        boxes_xyxy_image=np.array([50, 20, 90, 60]),
        size=size,
    )
    scale = 1 if size is None else size / 160
    assert drawn.shape[:2] == (round(120 * scale), round(160 * scale))

    def at(x, y, middle=0.5):
        return drawn[round((y + middle) * scale - 0.5), round((x + middle) * scale - 0.5)].astype(int)

    assert at(20, 30).min() > 240  # the star's white
    assert at(120, 90)[0] > at(120, 90)[2] + 100  # the dot's vermillion
    for x, y in [(50, 40), (90, 40), (70, 20), (70, 60)]:
        assert at(x, y, middle=0).min() > 180  # the box's white, along the borders of pixels
    assert (at(70, 40) == 100).all()  # its inside


def test_title_keeps_the_shape():
    image, _ = scene()
    drawn = draw_overlay(image, title="nuclei → 12 objects, and far more words than would ever fit on it")
    assert drawn.shape == image.shape
    assert (drawn[:12] != 100).any()
    assert (drawn[60:] == 100).all()


@pytest.mark.parametrize("shape", [(1, 1), (2, 300), (300, 2)])
def test_extreme_shapes(shape):
    image, mask = np.zeros((*shape, 3), np.uint8), np.ones(shape, bool)
    drawn = draw_overlay(image, [mask], np.array([(0, 0)]), None, np.array([0, 0, 1, 1]), "title", size=100)
    assert max(drawn.shape) == 100
