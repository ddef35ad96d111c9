"""Tokens cut into the windows that attend by themselves, and the terms that places add to their scores."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from segment_anything.modeling.image_encoder import Attention
from torch import Tensor


def split_windows(
    qkv: Float[Tensor, "B h w D"], sides: tuple[int, int], heads: int, bias: Float[Tensor, " D"]
) -> Float[Tensor, "3 W n P d"]:
    """q, k and v of W windows of `sides` (P places each), for each of n heads; D is 3 n d.

    Windows that reach over the edge are padded, and the padded tokens attend like all others. Upstream pads
    before the layer that makes q, k and v: of zeros that makes its bias. Padded after it, with the `bias`, the
    layer has 4,096 tokens to do instead of 4,900.
    """
    B, h, w, _ = qkv.shape
    rows, columns = sides
    down, across = -(-h // rows), -(-w // columns)
    below, right = down * rows - h, across * columns - w
    if below or right:
        inside_rows, inside_columns = (torch.arange(n, device=qkv.device) for n in (h + below, w + right))
        inside = (inside_rows < h)[:, None, None] & (inside_columns < w)[:, None]
        qkv = torch.where(inside, F.pad(qkv, (0, 0, 0, right, 0, below)), bias.to(qkv.dtype))
    cells = qkv.view(B, down, rows, across, columns, 3, heads, -1).permute(5, 0, 1, 3, 6, 2, 4, 7)
    return cells.reshape(3, B * down * across, heads, rows * columns, -1)


def join_windows(
    attended: Float[Tensor, "W n P d"], sides: tuple[int, int], hw: tuple[int, int]
) -> Float[Tensor, "B h w n*d"]:
    """The tokens of whole images again, heads side by side and padding cut off."""
    (rows, columns), (h, w) = sides, hw
    down, across = -(-h // rows), -(-w // columns)
    cells = attended.unflatten(2, sides).unflatten(0, (-1, down, across)).permute(0, 1, 4, 2, 5, 3, 6)
    return cells.reshape(len(cells), down * rows, across * columns, -1)[:, :h, :w]


def place_terms(
    attention: Attention, q: Float[Tensor, "W n P d"], sides: tuple[int, int]
) -> tuple[Float[Tensor, "W n P rows"], Float[Tensor, "W n P columns"]]:
    """What upstream adds to the scores of each query: for every row of keys, and for every column.

    These are q . R_h[row q, row k] and q . R_w[column q, column k]; the scale does not apply to them.
    """
    grid = q.unflatten(2, sides)
    from_rows = torch.einsum("bnhwc,hkc->bnhwk", grid, place_table(attention.rel_pos_h, sides[0]))
    from_columns = torch.einsum("bnhwc,wkc->bnhwk", grid, place_table(attention.rel_pos_w, sides[1]))
    return from_rows.flatten(2, 3), from_columns.flatten(2, 3)


def place_table(relative: Float[Tensor, "distances d"], side: int) -> Float[Tensor, "side side d"]:
    """The vector of each pair of places along an axis, as upstream's `get_rel_pos`, which waits for a GPU each time."""
    places = torch.arange(side, device=relative.device)
    return relative[places[:, None] - places + side - 1]
