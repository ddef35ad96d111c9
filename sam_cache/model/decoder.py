"""SAM's mask decoder for many prompts on many images, on upstream's own parameters.

Upstream (segment_anything/modeling/mask_decoder.py and transformer.py) decodes one image per call,
copies its tokens for every prompt and projects each copy. Here the same function is computed in a
cheaper order:

- until the first layer writes to them, an image's tokens are the same for all its prompts, so they
  are projected once per image;
- after that, the few tokens of a prompt are carried through a projection W instead of the thousands
  of image tokens: (q W) x = q (W x);
- tokens stay channels-last to the end, where a 2x2 transposed convolution of stride 2 is a linear
  layer of single tokens, and only the finished masks are rearranged.

Axes beyond those of `sam_cache.types`: N image tokens (g x g); K tokens of one prompt, and T with
the decoder's own output tokens before them; A attention heads of width d = D / A.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from segment_anything.modeling import MaskDecoder
from segment_anything.modeling.transformer import Attention, TwoWayAttentionBlock
from torch import Tensor, nn


class Masks(NamedTuple):
    """M masks for each of P prompts.

    `logits` lie in the square, padded input frame at the decoder's resolution; a pixel belongs to
    the mask where its logit is above 0. `scores` are the predicted IoUs.
    """

    logits: Float[Tensor, "P M h w"]
    scores: Float[Tensor, "P M"]


class SharedImages(NamedTuple):
    """What all prompts of an image share: its tokens before the first layer has written to them.

    `tokens` have the dense prompt added. `keys`, `values` and `queries` are what the first layer's
    two cross-attentions make of them, by heads.
    """

    tokens: Float[Tensor, "I N C"]
    position: Float[Tensor, "N C"]
    keys: Float[Tensor, "I A N d"]
    values: Float[Tensor, "I A N d"]
    queries: Float[Tensor, "I A N d"]


def share_images(
    decoder: MaskDecoder,
    neck: Float[Tensor, "I C g g"],
    dense: Float[Tensor, "*I_N C"],
    position: Float[Tensor, "C g g"],
) -> SharedImages:
    """Project every image once, for all its prompts.

    `dense` is added to the image's tokens: the embedding of 'no mask given', (1, C), or one of a mask
    for each image, (I, N, C).
    """
    layer = decoder.transformer.layers[0]
    to_image, to_token = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
    tokens = neck.flatten(2).mT + dense
    position = position.flatten(1).T
    placed = tokens + position
    return SharedImages(
        tokens=tokens,
        position=position,
        keys=_split_heads(to_image, to_image.k_proj(placed)),
        values=_split_heads(to_image, to_image.v_proj(tokens)),
        queries=_split_heads(to_token, to_token.q_proj(placed)),
    )


def decode(
    decoder: MaskDecoder,
    images: SharedImages,
    image_index: Int[Tensor, "P"],
    sparse: Float[Tensor, "P K C"],
    multimask: bool,
) -> Masks:
    """Predict masks for P prompts of equally many tokens; prompt p asks about image `image_index[p]`.

    With `multimask` the three masks for ambiguous prompts, else the one for unambiguous ones.
    """
    outputs = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens, image = attend(decoder, images, image_index, outputs, sparse)
    wanted = slice(1, None) if multimask else slice(0, 1)
    masks = upscale(decoder.output_upscaling, image) @ hypers_of(decoder, tokens)[:, wanted].mT
    return Masks(lay_out(masks), decoder.iou_prediction_head(tokens[:, 0])[:, wanted])


def attend(
    decoder: MaskDecoder,
    images: SharedImages,
    image_index: Int[Tensor, "P"],
    outputs: Float[Tensor, "O C"],
    sparse: Float[Tensor, "P K C"],
) -> tuple[Float[Tensor, "P T C"], Float[Tensor, "P N C"]]:
    """The two-way transformer: the tokens of `outputs` and of each prompt, and image tokens of its own for each."""
    prompt = torch.cat([outputs.expand(len(sparse), -1, -1), sparse], dim=1)
    transformer = decoder.transformer
    first, *later = transformer.layers
    tokens, image = _run_first_layer(first, prompt, images, image_index)
    for layer in later:
        tokens, image = _run_layer(layer, prompt, tokens, image, images.position)
    attended = _attend(transformer.final_attn_token_to_image, tokens + prompt, image, images.position)
    return transformer.norm_final_attn(tokens + attended), image


def hypers_of(decoder: MaskDecoder, tokens: Float[Tensor, "P T C"]) -> Float[Tensor, "P 4 c"]:
    """What pixels are multiplied with to make SAM's four masks, from the tokens after the first."""
    # All four small networks run, as upstream: where unused their gradients are zeros, never None.
    networks = enumerate(decoder.output_hypernetworks_mlps, start=1)
    return torch.stack([network(tokens[:, i]) for i, network in networks], dim=1)


def _run_first_layer(
    layer: TwoWayAttentionBlock,
    prompt: Float[Tensor, "P T C"],
    images: SharedImages,
    image_index: Int[Tensor, "P"],
) -> tuple[Float[Tensor, "P T C"], Float[Tensor, "P N C"]]:
    """Returns the prompts' tokens, and from here on image tokens of its own for every prompt."""
    tokens = layer.norm1(layer.self_attn(prompt, prompt, prompt))
    attended = _attend_shared(layer.cross_attn_token_to_image, tokens + prompt, images, image_index)
    tokens = _finish_tokens(layer, tokens, attended)
    to_token = layer.cross_attn_image_to_token
    keys = _scale(_split_heads(to_token, to_token.k_proj(tokens + prompt)))
    scores = keys @ images.queries.index_select(0, image_index).mT
    return tokens, _update_image(layer, images.tokens.index_select(0, image_index), scores, tokens)


def _run_layer(
    layer: TwoWayAttentionBlock,
    prompt: Float[Tensor, "P T C"],
    tokens: Float[Tensor, "P T C"],
    image: Float[Tensor, "P N C"],
    position: Float[Tensor, "N C"],
) -> tuple[Float[Tensor, "P T C"], Float[Tensor, "P N C"]]:
    placed = tokens + prompt
    tokens = layer.norm1(tokens + layer.self_attn(placed, placed, tokens))
    attended = _attend(layer.cross_attn_token_to_image, tokens + prompt, image, position)
    tokens = _finish_tokens(layer, tokens, attended)
    to_token = layer.cross_attn_image_to_token
    keys = _scale(_split_heads(to_token, to_token.k_proj(tokens + prompt)))
    scores = _score(keys, to_token.q_proj, image, position)
    return tokens, _update_image(layer, image, scores, tokens)


def _finish_tokens(
    layer: TwoWayAttentionBlock, tokens: Float[Tensor, "P T C"], attended: Float[Tensor, "P T C"]
) -> Float[Tensor, "P T C"]:
    tokens = layer.norm2(tokens + attended)
    return layer.norm3(tokens + layer.mlp(tokens))


def _attend_shared(
    attention: Attention, tokens: Float[Tensor, "P T C"], images: SharedImages, image_index: Int[Tensor, "P"]
) -> Float[Tensor, "P T C"]:
    """Token-to-image attention of the first layer: all prompts of an image are one long query."""
    q = attention.q_proj(tokens)
    slot, slots = _rank_within_image(image_index, len(images.tokens))
    by_image = q.new_zeros(len(images.tokens), slots, *q.shape[1:]).index_put((image_index, slot), q)
    by_image = _split_heads(attention, by_image.flatten(1, 2))
    attended = F.scaled_dot_product_attention(by_image, images.keys, images.values)
    attended = _join_heads(attended).unflatten(1, (slots, -1))
    return attention.out_proj(attended[image_index, slot])


def _rank_within_image(image_index: Int[Tensor, "P"], total: int) -> tuple[Int[Tensor, "P"], int]:
    """The number of each prompt among those of its image, and the most prompts an image has."""
    counts = torch.bincount(image_index, minlength=total)
    order = image_index.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    rank = torch.empty_like(image_index)
    rank[order] = torch.arange(len(order), device=order.device) - starts[image_index[order]]
    return rank, int(counts.max())


def _attend(
    attention: Attention,
    tokens: Float[Tensor, "P T C"],
    image: Float[Tensor, "P N C"],
    position: Float[Tensor, "N C"],
) -> Float[Tensor, "P T C"]:
    """Token-to-image attention where every prompt has image tokens of its own."""
    q = _scale(_split_heads(attention, attention.q_proj(tokens)))
    weights = _score(q, attention.k_proj, image, position).softmax(dim=-1)
    if _absorbs(q, attention.v_proj):
        # sum_n w_n (V x_n + b) = V (sum_n w_n x_n) + b, because the weights sum to 1.
        context = (weights.flatten(1, 2) @ image).unflatten(1, q.shape[1:3])
        value = attention.v_proj.weight.unflatten(0, (attention.num_heads, -1))
        attended = torch.einsum("patc,adc->ptad", context, value).flatten(2) + attention.v_proj.bias
    else:
        attended = _join_heads(weights @ _split_heads(attention, attention.v_proj(image)))
    return attention.out_proj(attended)


def _update_image(
    layer: TwoWayAttentionBlock,
    image: Float[Tensor, "P N C"],
    scores: Float[Tensor, "P A T N"],
    tokens: Float[Tensor, "P T C"],
) -> Float[Tensor, "P N C"]:
    """Image-to-token attention and its residual; `scores` are of every image token over T tokens."""
    attention = layer.cross_attn_image_to_token
    weights = scores.softmax(dim=2)
    v = _split_heads(attention, attention.v_proj(tokens))
    if _absorbs(v, attention.v_proj):
        # The output layer moves to the few tokens, and its bias rides on them in equal parts.
        # `baddbmm` adds the residual inside the matrix product: one pass over the image less.
        out = attention.out_proj.weight.unflatten(1, (attention.num_heads, -1))
        told = torch.einsum("patd,cad->patc", v, out) + attention.out_proj.bias / attention.num_heads
        return layer.norm4(torch.baddbmm(image, weights.flatten(1, 2).mT, told.flatten(1, 2)))
    return layer.norm4(image + attention.out_proj(_join_heads(weights.mT @ v)))


def _score(
    q: Float[Tensor, "P A T d"],
    projection: nn.Linear,
    image: Float[Tensor, "P N C"],
    position: Float[Tensor, "N C"],
) -> Float[Tensor, "P A T N"]:
    """Inner products of q and `projection(image + position)`, head by head."""
    heads, count = q.shape[1:3]
    if not _absorbs(q, projection):
        return q @ projection(image + position).unflatten(-1, (heads, -1)).permute(0, 2, 3, 1)
    absorbed = torch.einsum("patd,adc->patc", q, projection.weight.unflatten(0, (heads, -1)))
    of_image = (absorbed.flatten(1, 2) @ image.mT).unflatten(1, (heads, count))
    # The projected position is the same for all prompts. The bias goes with it: for keys it cancels
    # in the softmax, and k_proj.bias gets upstream's gradient of rounding errors about zero.
    of_position = projection(position).unflatten(-1, (heads, -1))
    return of_image + torch.einsum("patd,nad->patn", q, of_position)


def _absorbs(tokens: Float[Tensor, "P A T d"], projection: nn.Linear) -> bool:
    """Whether T tokens in A heads are carried through a projection to D channels: while A T < D."""
    return tokens.shape[1] * tokens.shape[2] < projection.out_features


def _split_heads(attention: Attention, x: Float[Tensor, "B n D"]) -> Float[Tensor, "B A n d"]:
    return x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)


def _join_heads(x: Float[Tensor, "B A n d"]) -> Float[Tensor, "B n D"]:
    return x.transpose(1, 2).flatten(2)


def _scale(q: Float[Tensor, "P A T d"]) -> Float[Tensor, "P A T d"]:
    """Divide by the root of the heads' width here, where there is little to divide, not in the scores."""
    return q * q.shape[-1] ** -0.5


def upscale(upscaling: nn.Sequential, image: Float[Tensor, "P N C"]) -> Float[Tensor, "P n c"]:
    """Upscale the image tokens four times: each makes 16 pixels, in the order that `lay_out` undoes."""
    conv, norm, activation, second_conv, second_activation = upscaling
    pixels = _transpose_tokens(conv, image)
    pixels = activation(F.layer_norm(pixels, norm.weight.shape, norm.weight, norm.bias, norm.eps))
    return second_activation(_transpose_tokens(second_conv, pixels)).flatten(1, -2)


def lay_out(pixels: Float[Tensor, "P n M"]) -> Float[Tensor, "P M h w"]:
    """Arrange upscaled pixels as maps."""
    P, n, M = pixels.shape
    g = round((n // 16) ** 0.5)
    # Of a token's 4 x 4 pixels, the first convolution chose the halves and the second the quarters.
    maps = pixels.view(P, g, g, 2, 2, 2, 2, M).permute(0, 7, 1, 3, 5, 2, 4, 6)
    return maps.reshape(P, M, 4 * g, 4 * g)


def _transpose_tokens(conv: nn.ConvTranspose2d, tokens: Float[Tensor, "*B c"]) -> Float[Tensor, "*B 4 o"]:
    """A 2x2 transposed convolution of stride 2: each token makes its own four pixels, row by row."""
    weight = conv.weight.permute(2, 3, 1, 0).flatten(0, 2)
    return F.linear(tokens, weight, conv.bias.repeat(4)).unflatten(-1, (4, -1))
