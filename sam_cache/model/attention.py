"""The encoder's transformer block on upstream's parameters, with fused attention."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from segment_anything.modeling.image_encoder import Attention, Block
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from sam_cache.model.bands import fits_bands, run_in_bands
from sam_cache.model.windows import join_windows, place_terms, split_windows

# From the tokens that enter a block's attention, what an adapter adds to their q, k and v.
AddedQkv = Callable[[Float[Tensor, "B h w C"]], Float[Tensor, "B h w 3*C"] | None]

# How places enter the scores of global attention: as further channels of q and k, or within the kernel.
Places = Literal["channels", "kernel"]


def run_block(
    block: Block,
    tokens: Float[Tensor, "B h w C"],
    added_qkv: AddedQkv = lambda normed: None,
    places: Places = "channels",
) -> Float[Tensor, "B h w C"]:
    """segment_anything's `Block.forward` with fused attention; `added_qkv` goes onto q, k and v, in that order."""
    normed = block.norm1(tokens)
    added = added_qkv(normed)
    if fits_bands(block, tokens, added):
        return run_in_bands(block, tokens, normed, added)
    qkv = block.attn.qkv(normed)
    if added is not None:
        qkv = qkv + added
    tokens = tokens + block.attn.proj(attend(block.attn, qkv, block.window_size, places))
    return tokens + block.mlp(block.norm2(tokens))


def attend(
    attention: Attention, qkv: Float[Tensor, "B h w D"], window: int, places: Places
) -> Float[Tensor, "B h w C"]:
    """Attention among all tokens or within windows, without the projection behind it; D is 3 C.

    It never holds the attention matrix. Windows always take their places as channels.
    """
    hw = qkv.shape[1], qkv.shape[2]
    sides = (window, window) if window else hw
    q, k, v = split_windows(qkv, sides, attention.num_heads, attention.qkv.bias)
    terms = place_terms(attention, q, sides)
    by = attend_in_kernel if places == "kernel" and not window else attend_by_channels
    return join_windows(by(q, k, v, *terms, attention.scale), sides, hw)


def attend_by_channels(
    q: Float[Tensor, "W n P d"],
    k: Float[Tensor, "W n P d"],
    v: Float[Tensor, "W n P d"],
    from_rows: Float[Tensor, "W n P rows"],
    from_columns: Float[Tensor, "W n P columns"],
    scale: float,
) -> Float[Tensor, "W n P d"]:
    """The terms of places are inner products too: with them appended to q, and a one-hot row and column of
    each key appended to k, one fused kernel, of any device and with gradients, computes the same sum.
    """
    width, rows, columns = q.shape[-1], from_rows.shape[-1], from_columns.shape[-1]
    # Fused kernels want one width for q, k and v, a multiple of 8; the zeros of v come out as zeros.
    spare = -(width + rows + columns) % 8
    one_hot_row = torch.eye(rows, device=q.device, dtype=q.dtype).repeat_interleave(columns, dim=0)
    one_hot_column = torch.eye(columns, columns + spare, device=q.device, dtype=q.dtype).repeat(rows, 1)
    places = torch.cat([one_hot_row, one_hot_column], dim=1).expand(*k.shape[:-1], -1)
    q = torch.cat([q * scale, from_rows, F.pad(from_columns, (0, spare))], dim=-1)
    k = torch.cat([k, places], dim=-1)
    v = F.pad(v, (0, q.shape[-1] - width))
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)[..., :width]


def attend_in_kernel(
    q: Float[Tensor, "W n P d"],
    k: Float[Tensor, "W n P d"],
    v: Float[Tensor, "W n P d"],
    from_rows: Float[Tensor, "W n P rows"],
    from_columns: Float[Tensor, "W n P columns"],
    scale: float,
) -> Float[Tensor, "W n P d"]:
    """The same by a kernel that adds the terms to each score while it is in a register, for torch.compile.

    A third of the products of `attend_by_channels` where heads are 64 wide: channels for 64 rows and 64 columns
    triple the width. Not compiled it would hold the attention matrix.
    """
    columns = from_columns.shape[-1]

    def add_terms(score: Tensor, window: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + from_rows[window, head, query, key // columns] + from_columns[window, head, query, key % columns]

    return flex_attention(q, k, v, score_mod=add_terms, scale=scale)
