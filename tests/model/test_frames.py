import pytest
import torch
from segment_anything.modeling import Sam

from sam_cache.model import SIZES, masks_to_image
from sam_cache.model.parts import build_image_encoder, build_mask_decoder, build_prompt_encoder

SIZE = SIZES["tiny"]


@pytest.mark.parametrize(
    ("content_hw", "image_hw"),
    [((128, 70), (300, 164)), ((33, 128), (20, 77)), ((128, 128), (50, 200)), ((128, 1), (500, 2))],
)
def test_equals_upstream(content_hw, image_hw):
    sam = Sam(build_image_encoder(SIZE), build_prompt_encoder(SIZE), build_mask_decoder(SIZE))
    logits = torch.randn(3, SIZE.mask_size, SIZE.mask_size)
    expected = sam.postprocess_masks(logits[None], content_hw, image_hw)[0]
    assert torch.equal(masks_to_image(logits, SIZE.input_size, content_hw, image_hw), expected)
