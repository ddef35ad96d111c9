import cv2
import numpy as np
import pytest

from sam_cache.evaluation import boundary_iou, dice, mask_iou


def literal_boundary(mask, dilation_ratio=0.02):
    """`mask_to_boundary` of bowenc0221/boundary-iou-api, restated step by step on the whole image."""
    mask = mask.astype(np.uint8)
    h, w = mask.shape
    img_diag = np.sqrt(h**2 + w**2)
    dilation = int(round(dilation_ratio * img_diag))
    if dilation < 1:
        dilation = 1
    eroded = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    for _ in range(dilation):
        eroded = cv2.erode(eroded, np.ones((3, 3), dtype=np.uint8))
    return (mask - eroded[1 : h + 1, 1 : w + 1]).astype(bool)


def blobs(generator, height, width):
    """Smooth random shapes, with holes and several parts, some cut by the image's border."""
    noise = generator.normal(size=(height, width)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), max(height, width) / 12)
    window = np.zeros((height, width), bool)
    (y0, y1), (x0, x1) = (np.sort(generator.integers(0, side + 1, 2)) for side in (height, width))
    window[y0:y1, x0:x1] = True
    return (smooth > 0) & window


@pytest.mark.parametrize(("height", "width"), [(60, 80), (200, 150), (1, 40), (300, 7), (1, 1)])
@pytest.mark.parametrize("ratio", [0.02, 0.08])
def test_boundary_iou_equals_the_whole_image_computation(height, width, ratio):
    generator = np.random.default_rng(height)
    for _ in range(25):
        a, b = blobs(generator, height, width), blobs(generator, height, width)
        expected = mask_iou(literal_boundary(a, ratio), literal_boundary(b, ratio))
        assert boundary_iou(a, b, ratio) == expected


def test_boundary_iou_at_the_image_border():
    whole = np.ones((100, 100), bool)
    inner = np.zeros_like(whole)
    inner[3:-3, 3:-3] = True  # the boundary is 3 px wide: round(0.02 * 141.4)
    assert boundary_iou(whole, inner) == 0
    assert mask_iou(whole, inner) == pytest.approx(0.8836)


def test_by_hand():
    a, b = np.zeros((2, 10, 10), bool)
    a[2:4, 0:6] = True
    b[2:4, 3:9] = True
    assert mask_iou(a, b) == 6 / 18
    assert dice(a, b) == 12 / 24
    assert boundary_iou(a, b) == 6 / 18  # two pixels thin: all boundary


def test_empty_masks():
    empty, one = np.zeros((5, 7), bool), np.zeros((5, 7), bool)
    one[2, 3] = True
    for measure in (mask_iou, dice, boundary_iou):
        assert measure(empty, empty) == 1
        assert measure(empty, one) == measure(one, empty) == 0
        assert measure(one, one) == 1


def test_memory_order_does_not_matter():
    generator = np.random.default_rng(0)
    a, b = blobs(generator, 90, 70), blobs(generator, 90, 70)
    for measure in (mask_iou, dice, boundary_iou):
        assert measure(np.asfortranarray(a), np.asfortranarray(b)) == measure(a, b)
        assert measure(a[::2, ::-1], b[::2, ::-1]) == measure(a[::2, ::-1].copy(), b[::2, ::-1].copy())
