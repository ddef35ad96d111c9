"""The encoder's transformer block on upstream's parameters, with fused attention."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from segment_anything.modeling.image_encoder import (
    Attention,
    Block,
    get_rel_pos,
    window_partition,
    window_unpartition,
)
from torch import Tensor

# From the tokens that enter a block's attention, what an adapter adds to their q, k and v.
AddedQkv = Callable[[Float[Tensor, "B h w C"]], Float[Tensor, "B h w 3*C"] | None]


def run_block(
    block: Block, tokens: Float[Tensor, "B h w C"], added_qkv: AddedQkv = lambda normed: None
) -> Float[Tensor, "B h w C"]:
    """segment_anything's `Block.forward` with `attend` for its attention."""
    normed = block.norm1(tokens)
    added = added_qkv(normed)
    if block.window_size > 0:
        # Windows that reach over the edge are padded, and the padded tokens attend like all others.
        windows, padded_hw = window_partition(normed, block.window_size)
        if added is not None:
            added = window_partition(added, block.window_size)[0]
        attended = attend(block.attn, windows, added)
        attended = window_unpartition(attended, block.window_size, padded_hw, tokens.shape[1:3])
    else:
        attended = attend(block.attn, normed, added)
    tokens = tokens + attended
    return tokens + block.mlp(block.norm2(tokens))


def attend(
    attention: Attention, tokens: Float[Tensor, "B h w C"], added: Float[Tensor, "B h w 3*C"] | None = None
) -> Float[Tensor, "B h w C"]:
    """Self-attention with decomposed relative positions, never holding the attention matrix.

    Upstream adds to the score of query q and key k the terms q . R_h[row q, row k] and
    q . R_w[column q, column k]. Both are inner products themselves: with those terms appended to q
    and a one-hot row and column of k appended to k, one fused kernel computes the same sum.

    `added` goes onto the q, k and v of the tokens, in upstream's order of channels.
    """
    B, h, w, C = tokens.shape
    qkv = attention.qkv(tokens)
    if added is not None:
        qkv = qkv + added
    q, k, v = qkv.view(B, h * w, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    grid = q.reshape(B, attention.num_heads, h, w, -1)
    from_rows = torch.einsum("bnhwc,hkc->bnhwk", grid, get_rel_pos(h, h, attention.rel_pos_h))
    from_columns = torch.einsum("bnhwc,wkc->bnhwk", grid, get_rel_pos(w, w, attention.rel_pos_w))
    one_hot_row = torch.eye(h, device=q.device, dtype=q.dtype).repeat_interleave(w, dim=0)
    one_hot_column = torch.eye(w, device=q.device, dtype=q.dtype).repeat(h, 1)
    places = torch.cat([one_hot_row, one_hot_column], dim=1).expand(*k.shape[:-1], h + w)
    q = torch.cat([q * attention.scale, from_rows.flatten(2, 3), from_columns.flatten(2, 3)], dim=-1)
    k = torch.cat([k, places], dim=-1)
    # Fused kernels want one width for q, k and v; the zeros come out as zeros and are dropped.
    v_width = v.shape[-1]
    v = F.pad(v, (0, q.shape[-1] - v_width))
    attended = F.scaled_dot_product_attention(q, k, v, scale=1.0)[..., :v_width]
    return attention.proj(attended.transpose(1, 2).reshape(B, h, w, C))
