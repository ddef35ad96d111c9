"""Attention between the few tokens of a prompt and thousands of image tokens that are the prompt's own.

The few are carried through a projection W instead of the thousands: (q W) x = q (W x), which costs less while
tokens times heads are fewer than the channels projected to. Axes are those of `sam_cache.model.decoder`.
"""

import torch
from jaxtyping import Float
from segment_anything.modeling.transformer import Attention, TwoWayAttentionBlock
from torch import Tensor, nn


def attend_image(
    attention: Attention,
    tokens: Float[Tensor, "P T C"],
    image: Float[Tensor, "P N C"],
    position: Float[Tensor, "N C"],
) -> Float[Tensor, "P T C"]:
    """Token-to-image attention where every prompt has image tokens of its own."""
    q = scale(split_heads(attention, attention.q_proj(tokens)))
    weights = score_image(q, attention.k_proj, image, position).softmax(dim=-1)
    if _absorbs(q, attention.v_proj):
        # sum_n w_n (V x_n + b) = V (sum_n w_n x_n) + b, because the weights sum to 1.
        context = (weights.flatten(1, 2) @ image).unflatten(1, q.shape[1:3])
        value = attention.v_proj.weight.unflatten(0, (attention.num_heads, -1))
        attended = torch.einsum("patc,adc->ptad", context, value).flatten(2) + attention.v_proj.bias
    else:
        attended = join_heads(weights @ split_heads(attention, attention.v_proj(image)))
    return attention.out_proj(attended)


def update_image(
    layer: TwoWayAttentionBlock,
    image: Float[Tensor, "P N C"],
    scores: Float[Tensor, "P A T N"],
    tokens: Float[Tensor, "P T C"],
) -> Float[Tensor, "P N C"]:
    """Image-to-token attention and its residual; `scores` are of every image token over T tokens."""
    attention = layer.cross_attn_image_to_token
    weights = scores.softmax(dim=2)
    v = split_heads(attention, attention.v_proj(tokens))
    if _absorbs(v, attention.v_proj):
        # The output layer moves to the few tokens, and its bias rides on them in equal parts.
        # `baddbmm` adds the residual inside the matrix product: one pass over the image less.
        out = attention.out_proj.weight.unflatten(1, (attention.num_heads, -1))
        told = torch.einsum("patd,cad->patc", v, out) + attention.out_proj.bias / attention.num_heads
        updated = torch.baddbmm(image, weights.flatten(1, 2).mT, told.flatten(1, 2))
    else:
        updated = image + attention.out_proj(join_heads(weights.mT @ v))
    # Under autocast the norm answers in fp32: one cast here saves one in every product to come.
    return layer.norm4(updated).to(updated.dtype)


def score_image(
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
    # The projected position is the same for all prompts. The bias goes with it: for keys it cancels
    # in the softmax, and k_proj.bias gets upstream's gradient of rounding errors about zero.
    of_position = torch.einsum("patd,nad->patn", q, projection(position).unflatten(-1, (heads, -1)))
    scores = _Scores.apply(of_position.flatten(1, 2), absorbed.flatten(1, 2), image.to(absorbed.dtype))
    return scores.unflatten(1, (heads, count))


class _Scores(torch.autograd.Function):
    """`added + tokens @ image.mT`, with a gradient of the image that lies in memory as the image does.

    Autograd would give it transposed, and then add it to the image's other gradients at a third of the speed.
    """

    @staticmethod
    def forward(
        ctx, added: Float[Tensor, "P t N"], tokens: Float[Tensor, "P t C"], image: Float[Tensor, "P N C"]
    ) -> Float[Tensor, "P t N"]:
        ctx.save_for_backward(tokens, image)
        return torch.baddbmm(added, tokens, image.mT)

    @staticmethod
    def backward(ctx, gradient: Float[Tensor, "P t N"]) -> tuple[Tensor, Tensor, Tensor]:
        tokens, image = ctx.saved_tensors
        return gradient, gradient @ image, gradient.mT @ tokens


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
