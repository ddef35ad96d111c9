"""A block of the encoder on a CPU: a band of tokens at a time, so that what is computed of it stays in the cache."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from segment_anything.modeling.image_encoder import Attention, Block
from torch import Tensor

from sam_cache.model.products import apply_linear, multiply
from sam_cache.model.windows import join_windows, place_table, place_terms, split_windows

# Tokens that go through the MLP together: its weights, read once for each band, want many; the cache wants few.
BAND = 1024
# Queries whose scores with all keys are held at a time: 4 MiB of them.
QUERIES = 256


def fits_bands(block: Block, tokens: Float[Tensor, "B h w C"], added: Float[Tensor, "B h w 3*C"] | None) -> bool:
    """Whether `run_in_bands` computes this block: in fp32 on a CPU, and nothing asks for a gradient of it."""
    if tokens.device.type != "cpu" or tokens.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    if torch.compiler.is_compiling():  # which makes loops and buffers of its own
        return False
    inputs = (tokens, *block.parameters()) if added is None else (tokens, added, *block.parameters())
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs))


def run_in_bands(
    block: Block,
    tokens: Float[Tensor, "B h w C"],
    normed: Float[Tensor, "B h w C"],
    added: Float[Tensor, "B h w 3*C"] | None,
) -> Float[Tensor, "B h w C"]:
    """`run_block` without gradients. `normed` are the tokens as the attention sees them.

    Buffers of a whole image are larger than the cache, and so large that the C library returns them to the system
    after each layer: the next one's first touch of every page costs as much as many products.
    """
    out = torch.empty_like(tokens)
    step = block.window_size or tokens.shape[1]
    for image in range(len(tokens)):
        for top in range(0, tokens.shape[1], step):
            band = image, slice(top, top + step)
            qkv = apply_linear(block.attn.qkv, normed[band])
            if added is not None:
                qkv += added[band]
            attended = _attend_windows(block, qkv) if block.window_size else _attend_globally(block.attn, qkv)
            _finish(block, tokens[band].flatten(0, 1), attended.flatten(0, 1), out[band].view(-1, out.shape[-1]))
    return out


def _finish(
    block: Block, tokens: Float[Tensor, "N C"], attended: Float[Tensor, "N C"], out: Float[Tensor, "N C"]
) -> None:
    """What follows the attention, into `out`."""
    for first in range(0, len(tokens), BAND):
        band = slice(first, first + BAND)
        summed = apply_linear(block.attn.proj, attended[band]).add_(tokens[band])
        hidden = apply_linear(block.mlp.lin1, block.norm2(summed), gelu=True)
        torch.add(apply_linear(block.mlp.lin2, hidden), summed, out=out[band])


def _attend_windows(block: Block, qkv: Float[Tensor, "h w D"]) -> Float[Tensor, "h w C"]:
    """Within a row of windows, whose scores are few enough to hold their terms of places."""
    attention, sides = block.attn, (block.window_size, block.window_size)
    q, k, v = split_windows(qkv[None], sides, attention.num_heads, attention.qkv.bias)
    from_rows, from_columns = place_terms(attention, q, sides)
    terms = (from_rows[..., None] + from_columns[..., None, :]).flatten(3)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=terms, scale=attention.scale)
    return join_windows(attended, sides, (qkv.shape[0], qkv.shape[1]))[0]


def _attend_globally(attention: Attention, qkv: Float[Tensor, "h w D"]) -> Float[Tensor, "h w C"]:
    """Among all tokens of an image, by plain products: fused kernels want the terms of places as a matrix or as
    channels, and either costs more than the attention itself.
    """
    h, w, _ = qkv.shape
    tables = place_table(attention.rel_pos_h, h), place_table(attention.rel_pos_w, w)
    q, k, v = qkv.view(h, w, 3, attention.num_heads, -1).permute(2, 3, 0, 1, 4)
    out = qkv.new_empty(h, w, attention.num_heads, q.shape[-1])
    rows = max(1, QUERIES // w)
    for head in range(attention.num_heads):
        from_rows = q[head] @ tables[0].mT
        from_columns = (q[head].transpose(0, 1) @ tables[1].mT).transpose(0, 1)
        keys, values = k[head].flatten(0, 1), v[head].flatten(0, 1).T.contiguous()
        for top in range(0, h, rows):
            band = slice(top, top + rows)
            scores = multiply((q[head, band] * attention.scale).flatten(0, 1), keys)
            cells = scores.view(-1, w, h, w)
            cells += from_rows[band, :, :, None]
            cells += from_columns[band, :, None]
            out[band, :, head] = multiply(scores.softmax(-1), values).view(-1, w, out.shape[-1])
    return out.flatten(2)
