"""Predicted masks, back in the frame of the image they were predicted for."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def masks_to_image(
    logits: Float[Tensor, "n h w"], input_size: int, content_hw: tuple[int, int], image_hw: tuple[int, int]
) -> Float[Tensor, "n H W"]:
    """Upscale one image's logits to its own size, `image_hw`, as segment_anything's `Sam.postprocess_masks`.

    First to the square input of `input_size`, where the padding beyond `content_hw` is cut off, then
    to the image; both bilinear. An image squashed to the input has `content_hw` (input_size, input_size).
    """
    rows, columns = content_hw
    # As one image of many channels, like upstream: of one channel each, some processors round otherwise.
    square = F.interpolate(logits[None], (input_size, input_size), mode="bilinear", align_corners=False)
    return F.interpolate(square[..., :rows, :columns], image_hw, mode="bilinear", align_corners=False)[0]
