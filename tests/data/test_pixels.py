import cv2
import numpy as np
import pytest
from PIL import Image
from segment_anything.utils.transforms import ResizeLongestSide
from torchvision.transforms.functional import resize as torchvision_resize
from torchvision.transforms.functional import to_pil_image

from sam_cache.data.geometry import Geometry
from sam_cache.data.pixels import to_pixels

SHAPES = [(48, 64), (64, 48), (128, 128), (300, 451), (1, 1), (90, 1), (500, 49)]


def photograph(height, width):
    """Smooth, as photographs are, with colours that differ."""
    noise = np.random.default_rng(height * 7 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), 1.5).reshape(height, width, 3)


@pytest.mark.parametrize("shape", SHAPES)
def test_upstream_equals_upstream_to_the_bit(shape):
    image, geometry = photograph(*shape), Geometry(*shape, 128)
    expected = np.zeros((128, 128, 3), np.uint8)
    resized = ResizeLongestSide(128).apply_image(image)
    expected[: resized.shape[0], : resized.shape[1]] = resized
    assert np.array_equal(to_pixels(image, geometry), expected)
    used = np.full_like(expected, 7)
    assert to_pixels(image, geometry, out=used) is used
    assert np.array_equal(used, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_squash_equals_torchvision_to_the_bit(shape):
    image = photograph(*shape)
    expected = np.asarray(torchvision_resize(to_pil_image(image), [128, 128]))
    assert np.array_equal(to_pixels(image, Geometry(*shape, 128, "squash")), expected)


@pytest.mark.parametrize("fit", ["longest", "squash"])
@pytest.mark.parametrize("shape", SHAPES)
def test_fast_is_at_most_one_grey_level_off(shape, fit):
    image, geometry = photograph(*shape), Geometry(*shape, 128, fit)
    difference = np.abs(to_pixels(image, geometry, "fast").astype(int) - to_pixels(image, geometry))
    assert difference.max() <= 1


@pytest.mark.parametrize("pattern", ["fruits_nuts/images/*.jpg", "coco_sample/**/*.jpg"])
def test_fast_on_real_photographs_is_off_by_two_in_one_of_30000_values(real_data, pattern):
    files = sorted(real_data.glob(pattern))[:3]
    for file in files:
        image = np.asarray(Image.open(file))  # read-only, which must not matter
        geometry = Geometry(*image.shape[:2], 512)
        difference = np.abs(to_pixels(image, geometry, "fast").astype(int) - to_pixels(image, geometry))
        assert difference.max() <= 2
        assert np.count_nonzero(difference) < 0.05 * difference.size
        assert np.count_nonzero(difference == 2) < difference.size / 30_000
    assert files


@pytest.mark.parametrize("resize", ["upstream", "fast"])
@pytest.mark.parametrize("shape", [(2048, 12288), (12288, 2048), (1, 5000)])
def test_extreme_shapes_keep_their_content_and_are_padded_with_zeros(shape, resize):
    image, geometry = np.full((*shape, 3), 200, np.uint8), Geometry(*shape, 256)
    pixels = to_pixels(image, geometry, resize)
    content = np.zeros((256, 256), bool)
    content[: geometry.content_height, : geometry.content_width] = True
    assert (pixels[content] == 200).all()
    assert not pixels[~content].any()
