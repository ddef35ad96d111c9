"""SAM's mask decoder for many prompts on many images, on upstream's own parameters.

Upstream (segment_anything/modeling/mask_decoder.py and transformer.py) decodes one image per call,
copies its tokens for every prompt and projects each copy. Here the same function is computed in a
cheaper order:

- until the first layer writes to them, an image's tokens are the same for all its prompts, so they
  are projected once per image;
- after that, the few tokens of a prompt are carried through a projection instead of the thousands of
  image tokens: see `sam_cache.model.image_attention`;
- the last attention is asked for those tokens alone whose answers are used: two of seven for one mask;
- tokens stay channels-last to the end, where masks are read off them: see `sam_cache.model.upscaling`.

Axes beyond those of `sam_cache.types`: N image tokens (g x g); K tokens of one prompt, and T with
the decoder's own output tokens before them; A attention heads of width d = D / A.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from segment_anything.modeling import MaskDecoder
from segment_anything.modeling.transformer import TwoWayAttentionBlock
from torch import Tensor, nn

from sam_cache.model.image_attention import (
    attend_image,
    join_heads,
    scale,
    split_heads,
    update_image,
    update_shared_image,
)
from sam_cache.model.linear import project
from sam_cache.model.upscaling import group_cells, read_cells, read_maps


class Masks(NamedTuple):
    """M masks for each of P prompts.

    `logits` lie in the square, padded input frame at the decoder's resolution, as maps (P, M, h, w), or
    (P, M, S) at the S cells that were asked for; a cell belongs to the mask where its logit is above 0.
    `scores` are the predicted IoUs.
    """

    logits: Float[Tensor, "P M *cells"]
    scores: Float[Tensor, "P M"]


class SharedImages(NamedTuple):
    """What all prompts of an image share: its tokens before the first layer has written to them.

    `tokens` have the embedding of 'no mask given' added. `keys`, `values` and `queries` are what the first
    layer's two cross-attentions make of them, by heads.
    """

    tokens: Float[Tensor, "I N C"]
    position: Float[Tensor, "N C"]
    keys: Float[Tensor, "I A N d"]
    values: Float[Tensor, "I A N d"]
    queries: Float[Tensor, "I A N d"]


class OwnImages(NamedTuple):
    """Image tokens of prompts that share nothing, because each has a mask of its own added to its image."""

    tokens: Float[Tensor, "P N C"]
    position: Float[Tensor, "N C"]


def share_images(
    decoder: MaskDecoder,
    neck: Float[Tensor, "I C g g"],
    no_mask: Float[Tensor, "1 C"],
    position: Float[Tensor, "C g g"],
) -> SharedImages:
    """Project every image once, for all its prompts without a mask."""
    layer = decoder.transformer.layers[0]
    to_image, to_token = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
    tokens = _channels_last(neck) + no_mask
    position = _channels_last(position)
    placed = tokens + position
    return SharedImages(
        tokens=tokens,
        position=position,
        keys=split_heads(to_image, project(to_image.k_proj, placed)),
        values=split_heads(to_image, project(to_image.v_proj, tokens)),
        queries=split_heads(to_token, project(to_token.q_proj, placed)),
    )


def own_images(
    downscaling: nn.Sequential,
    neck: Float[Tensor, "I C g g"],
    image_index: Int[Tensor, "P"],
    masks: Float[Tensor, "P h w"],
    position: Float[Tensor, "C g g"],
) -> OwnImages:
    """Add to each prompt's image what `downscaling` makes of its mask."""
    *small, widen = downscaling
    marks = nn.Sequential(*small)(masks.unsqueeze(1)).flatten(2).mT
    image = (_channels_last(neck) + widen.bias).index_select(0, image_index)
    # The 1x1 convolution to all channels is a matrix product, and adding it to the image a part of that.
    weight = widen.weight.flatten(1).mT.expand(len(masks), -1, -1)
    return OwnImages(torch.baddbmm(image, marks, weight), _channels_last(position))


def decode(
    decoder: MaskDecoder,
    images: SharedImages | OwnImages,
    image_index: Int[Tensor, "P"],
    sparse: Float[Tensor, "P K C"],
    multimask: bool,
    cells: Int[Tensor, "P S"] | None = None,
) -> Masks:
    """Predict masks for P prompts of equally many tokens; prompt p asks about image `image_index[p]`.

    With `multimask` the three masks for ambiguous prompts, else the one for unambiguous ones. With `cells`
    of the map, y * w + x, the logits of each prompt's own S cells (P, M, S); the map is never made.
    """
    outputs = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    first, last = (1, 4) if multimask else (0, 1)
    wanted, upscaling = [0, *range(first + 1, last + 1)], decoder.output_upscaling
    groups = None if cells is None else group_cells(cells, len(images.position))
    tokens, image = attend(decoder, images, image_index, outputs, sparse, wanted, groups and groups.rows)
    hypers = hypers_of(decoder, tokens[:, 1:], first)
    scores = decoder.iou_prediction_head(tokens[:, 0])[:, first:last]
    if groups is None:
        return Masks(read_maps(upscaling, image, hypers), scores)
    return Masks(read_cells(upscaling, image, hypers, groups), scores)


def attend(
    decoder: MaskDecoder,
    images: SharedImages | OwnImages,
    image_index: Int[Tensor, "P"],
    outputs: Float[Tensor, "O C"],
    sparse: Float[Tensor, "P K C"],
    wanted: list[int],
    rows: Int[Tensor, "R"] | None = None,
) -> tuple[Float[Tensor, "P _ C"], Float[Tensor, "P N C"] | Float[Tensor, "R C"]]:
    """The two-way transformer: those of the tokens `outputs` that are `wanted`, and each prompt's image tokens.

    With `rows` only those rows of all prompts' image tokens.
    """
    prompt = torch.cat([outputs.expand(len(sparse), -1, -1), sparse], dim=1)
    transformer, position = decoder.transformer, images.position
    first, *later = transformer.layers
    tokens = first.norm1(first.self_attn(prompt, prompt, prompt))
    if isinstance(images, SharedImages):
        tokens, image = _exchange_shared(first, prompt, tokens, images, image_index)
    else:
        tokens, image = _exchange(first, prompt, tokens, images.tokens, position)
    for layer in later:
        placed = tokens + prompt
        tokens = layer.norm1(tokens + layer.self_attn(placed, placed, tokens))
        tokens, image = _exchange(layer, prompt, tokens, image, position)
    tokens, prompt = tokens[:, wanted], prompt[:, wanted]
    attended, picked = attend_image(transformer.final_attn_token_to_image, tokens + prompt, image, position, rows)
    return transformer.norm_final_attn(tokens + attended), image if picked is None else picked


def hypers_of(decoder: MaskDecoder, tokens: Float[Tensor, "P M C"], first: int) -> Float[Tensor, "P M c"]:
    """What pixels are multiplied with to make masks `first`, `first` + 1 and so on of SAM's four, from their tokens."""
    networks = list(decoder.output_hypernetworks_mlps)
    used = range(first, first + tokens.shape[1])
    hypers = torch.stack([networks[i](tokens[:, i - first]) for i in used], dim=1)
    # The others are run on no token at all: their gradients are zeros as upstream's, never None, and cost nothing.
    idle = [networks[i](tokens[:0, 0]).sum() for i in range(len(networks)) if i not in used]
    return hypers + sum(idle) if idle else hypers


def _channels_last(image: Float[Tensor, "*I C g g"]) -> Float[Tensor, "*I N C"]:
    """In memory too, however the image came: so products are fast, and rounded alike for levels cached and live."""
    return image.flatten(-2).mT.contiguous()


def _exchange_shared(
    layer: TwoWayAttentionBlock,
    prompt: Float[Tensor, "P T C"],
    tokens: Float[Tensor, "P T C"],
    images: SharedImages,
    image_index: Int[Tensor, "P"],
) -> tuple[Float[Tensor, "P T C"], Float[Tensor, "P N C"]]:
    """`_exchange` with images that their prompts share; from here on every prompt has image tokens of its own."""
    seats = _Seats.of(image_index, len(images.tokens))
    to_image, to_token = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
    q = seats.by_image(split_heads(to_image, to_image.q_proj(tokens + prompt)))
    attended = seats.by_prompt(F.scaled_dot_product_attention(q, images.keys, images.values))
    tokens = _finish_tokens(layer, tokens, to_image.out_proj(join_heads(attended)))
    k = seats.by_image(scale(split_heads(to_token, to_token.k_proj(tokens + prompt))))
    scores = seats.by_prompt(k @ images.queries.mT)
    return tokens, update_shared_image(layer, tokens, scores, images.tokens, image_index)


def _exchange(
    layer: TwoWayAttentionBlock,
    prompt: Float[Tensor, "P T C"],
    tokens: Float[Tensor, "P T C"],
    image: Float[Tensor, "P N C"],
    position: Float[Tensor, "N C"],
) -> tuple[Float[Tensor, "P T C"], Float[Tensor, "P N C"]]:
    """A layer from its self-attention on: the tokens look at the image, and then the image at them."""
    attended, _ = attend_image(layer.cross_attn_token_to_image, tokens + prompt, image, position)
    tokens = _finish_tokens(layer, tokens, attended)
    to_token = layer.cross_attn_image_to_token
    keys = scale(split_heads(to_token, to_token.k_proj(tokens + prompt)))
    return tokens, update_image(layer, tokens, keys, image, position)


def _finish_tokens(
    layer: TwoWayAttentionBlock, tokens: Float[Tensor, "P T C"], attended: Float[Tensor, "P T C"]
) -> Float[Tensor, "P T C"]:
    tokens = layer.norm2(tokens + attended)
    return layer.norm3(tokens + layer.mlp(tokens))


class _Seats(NamedTuple):
    """Where each prompt sits among those of its image: all prompts of an image are one long query to it."""

    image_index: Int[Tensor, "P"]
    number: Int[Tensor, "P"]
    images: int
    each: int

    @classmethod
    def of(cls, image_index: Int[Tensor, "P"], images: int) -> "_Seats":
        counts = torch.bincount(image_index, minlength=images)
        order = image_index.argsort(stable=True)
        starts = counts.cumsum(0) - counts
        number = torch.empty_like(image_index)
        number[order] = torch.arange(len(order), device=order.device) - starts[image_index[order]]
        return cls(image_index, number, images, int(counts.max()))

    def by_image(self, x: Float[Tensor, "P A T d"]) -> Float[Tensor, "I A n d"]:
        """The tokens of all prompts of an image after one another; zeros on empty seats."""
        seated = x.new_zeros(self.images, self.each, *x.shape[1:]).index_put((self.image_index, self.number), x)
        return seated.transpose(1, 2).flatten(2, 3)

    def by_prompt(self, x: Float[Tensor, "I A n d"]) -> Float[Tensor, "P A T d"]:
        return x.unflatten(2, (self.each, -1)).transpose(1, 2)[self.image_index, self.number]
