"""Attention between the few tokens of a prompt and thousands of image tokens that are the prompt's own.

The few are carried through a projection W instead of the thousands: (q W) x = q (W x), which costs less while
tokens times heads are fewer than the channels projected to. Axes are those of `sam_cache.model.decoder`.
"""

import torch
from jaxtyping import Float, Int
from segment_anything.modeling.transformer import Attention, TwoWayAttentionBlock
from torch import Tensor, nn

from sam_cache.model.image_passes import ReadImage, UpdateImage
from sam_cache.model.linear import project


def attend_image(
    attention: Attention,
    tokens: Float[Tensor, "P T C"],
    image: Float[Tensor, "P N C"],
    position: Float[Tensor, "N C"],
    rows: Int[Tensor, "R"] | None = None,
) -> tuple[Float[Tensor, "P T C"], Float[Tensor, "R C"] | None]:
    """Token-to-image attention where every prompt has image tokens of its own.

    With `rows` of all prompts' image tokens, P N, these as well.
    """
    q = scale(split_heads(attention, attention.q_proj(tokens)))
    if _absorbs(q, attention.v_proj):
        added, queries = _absorb(q, attention.k_proj, position)
        context, picked = ReadImage.apply(added, queries, image.to(queries.dtype), rows)
        # sum_n w_n (V x_n + b) = V (sum_n w_n x_n) + b, because the weights sum to 1.
        value = attention.v_proj.weight.unflatten(0, (attention.num_heads, -1))
        attended = torch.einsum("patc,adc->ptad", context.unflatten(1, q.shape[1:3]), value).flatten(2)
        attended = attended + attention.v_proj.bias
    else:
        weights = _score(q, attention.k_proj, image, position).softmax(dim=-1)
        attended = join_heads(weights @ split_heads(attention, attention.v_proj(image)))
        picked = None if rows is None else image.flatten(0, 1).index_select(0, rows)
    return attention.out_proj(attended), picked


def update_image(
    layer: TwoWayAttentionBlock,
    tokens: Float[Tensor, "P T C"],
    k: Float[Tensor, "P A T d"],
    image: Float[Tensor, "P N C"],
    position: Float[Tensor, "N C"],
) -> Float[Tensor, "P N C"]:
    """Image-to-token attention, its residual and norm, where every prompt has image tokens of its own."""
    attention = layer.cross_attn_image_to_token
    if _absorbs(k, attention.v_proj):
        return _update(layer, tokens, image, None, *_absorb(k, attention.q_proj, position))
    scores = _score(k, attention.q_proj, image, position)
    return _update_plainly(layer, tokens, image, scores)


def update_shared_image(
    layer: TwoWayAttentionBlock,
    tokens: Float[Tensor, "P T C"],
    scores: Float[Tensor, "P A T N"],
    images: Float[Tensor, "I N C"],
    image_index: Int[Tensor, "P"],
) -> Float[Tensor, "P N C"]:
    """`update_image` where prompts share images, and `scores` of every image token over T tokens are there."""
    if _absorbs(scores[..., :1], layer.cross_attn_image_to_token.v_proj):
        return _update(layer, tokens, images, image_index, scores.flatten(1, 2), None)
    return _update_plainly(layer, tokens, images.index_select(0, image_index), scores)


def _update(
    layer: TwoWayAttentionBlock,
    tokens: Float[Tensor, "P T C"],
    image: Float[Tensor, "B N C"],
    index: Int[Tensor, "P"] | None,
    added: Float[Tensor, "P t N"],
    keys: Float[Tensor, "P t C"] | None,
) -> Float[Tensor, "P N C"]:
    attention, norm = layer.cross_attn_image_to_token, layer.norm4
    v = split_heads(attention, attention.v_proj(tokens))
    # The output layer moves to the few tokens, and its bias rides on them in equal parts.
    out = attention.out_proj.weight.unflatten(1, (attention.num_heads, -1))
    told = torch.einsum("patd,cad->patc", v, out) + (attention.out_proj.bias / attention.num_heads).to(v.dtype)
    given = added, keys, image.to(told.dtype), index, told.flatten(1, 2)
    return UpdateImage.apply(*given, norm.weight, norm.bias, norm.eps, attention.num_heads)


def _update_plainly(
    layer: TwoWayAttentionBlock,
    tokens: Float[Tensor, "P T C"],
    image: Float[Tensor, "P N C"],
    scores: Float[Tensor, "P A T N"],
) -> Float[Tensor, "P N C"]:
    attention = layer.cross_attn_image_to_token
    v = split_heads(attention, attention.v_proj(tokens))
    return layer.norm4(image + attention.out_proj(join_heads(scores.softmax(dim=2).mT @ v)))


def _absorb(
    q: Float[Tensor, "P A T d"], projection: nn.Linear, position: Float[Tensor, "N C"]
) -> tuple[Float[Tensor, "P t N"], Float[Tensor, "P t C"]]:
    """`_score` in two parts: what the positions make of it, and queries of which the image makes the rest."""
    weight = projection.weight.unflatten(0, (q.shape[1], -1))
    # The projected position is the same for all prompts. The bias goes with it: for keys it cancels
    # in the softmax, and k_proj.bias gets upstream's gradient of rounding errors about zero.
    of_position = torch.einsum("patd,nad->patn", q, project(projection, position).unflatten(-1, (q.shape[1], -1)))
    return of_position.flatten(1, 2), torch.einsum("patd,adc->patc", q, weight).flatten(1, 2)


def _score(
    q: Float[Tensor, "P A T d"],
    projection: nn.Linear,
    image: Float[Tensor, "P N C"],
    position: Float[Tensor, "N C"],
) -> Float[Tensor, "P A T N"]:
    """Inner products of q and `projection(image + position)`, head by head."""
    return q @ projection(image + position).unflatten(-1, (q.shape[1], -1)).permute(0, 2, 3, 1)


def _absorbs(tokens: Float[Tensor, "P A T d"], projection: nn.Linear) -> bool:
    """Whether T tokens in A heads are carried through a projection to D channels: while A T < D."""
    return tokens.shape[1] * tokens.shape[2] < projection.out_features


def split_heads(attention: Attention, x: Float[Tensor, "B n D"]) -> Float[Tensor, "B A n d"]:
    return x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)


def join_heads(x: Float[Tensor, "B A n d"]) -> Float[Tensor, "B n D"]:
    return x.transpose(1, 2).flatten(2)


def scale(q: Float[Tensor, "P A T d"]) -> Float[Tensor, "P A T d"]:
    """Divide by the root of the heads' width here, where there is little to divide, not in the scores."""
    return q * q.shape[-1] ** -0.5
