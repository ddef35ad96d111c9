"""HQ-SAM's head: one more output token, and pixels that see fine detail (Ke et al. 2023).

The token attends like SAM's own; its mask is read from the decoder's upscaled pixels, refined, plus features
of the image that come from the neck and from an early level of the encoder. These features depend on the
image alone and are made once for all its prompts. Layers and names are upstream's
(segment_anything_hq/modeling/mask_decoder_hq.py); axes are those of `sam_cache.model.decoder`.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from segment_anything.modeling import MaskDecoder
from torch import Tensor

from sam_cache.model.decoder import Masks, OwnImages, SharedImages, attend, hypers_of
from sam_cache.model.upscaling import lay_out, upscale

# `hq`: the head's own logits, as it is trained; `sum`: those plus SAM's, as the released predictor adds them.
HqOutput = Literal["hq", "sum"]


def find_detail(
    decoder: MaskDecoder, neck: Float[Tensor, "I C g g"], early: Float[Tensor, "I D g g"]
) -> Float[Tensor, "I c h w"]:
    """What the head sees of each image, at the masks' resolution."""
    return decoder.embedding_encoder(neck) + decoder.compress_vit_feat(early)


def decode_hq(
    decoder: MaskDecoder,
    images: SharedImages | OwnImages,
    image_index: Int[Tensor, "P"],
    sparse: Float[Tensor, "P K C"],
    multimask: bool,
    detail: Float[Tensor, "P c h w"],
    output: HqOutput,
    cells: Int[Tensor, "P S"] | None = None,
) -> Masks:
    """One mask for each of P prompts of equally many tokens; `detail` is that of each prompt's image.

    With `multimask` SAM's share in the sum is the one of its three masks whose predicted IoU is highest,
    else the one for unambiguous prompts; the score is that mask's. With `cells`, y * w + x, the finished maps
    are read at each prompt's own S cells.
    """
    outputs = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight, decoder.hf_token.weight])
    first, last = (1, 4) if multimask else (0, 1)
    of_masks = range(first + 1, last + 1) if output == "sum" else ()
    wanted = [0, len(outputs) - 1, *of_masks]
    tokens, image = attend(decoder, images, image_index, outputs, sparse, wanted)
    pixels = upscale(decoder.output_upscaling, image)
    hyper = decoder.hf_mlp(tokens[:, 1])
    fine = decoder.embedding_maskfeature(lay_out(pixels)) + detail
    logits = torch.einsum("pc,pchw->phw", hyper, fine).unsqueeze(1)

    scores, best = decoder.iou_prediction_head(tokens[:, 0])[:, first:last].max(dim=1, keepdim=True)
    if output == "sum":
        chosen = hypers_of(decoder, tokens[:, 2:], first).take_along_dim(best.unsqueeze(2), dim=1)
        logits = logits + lay_out(pixels @ chosen.mT)
    if cells is not None:
        logits = logits.flatten(2).take_along_dim(cells.unsqueeze(1), dim=2)
    return Masks(logits, scores)
