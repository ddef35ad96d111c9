"""From image tokens to masks: the decoder's two transposed convolutions, for whole maps or for single cells.

Both are 2x2 with stride 2, and so linear layers of single tokens: a token makes the 4 x 4 cells of the map
that lie above it, and a cell depends on its token alone. Whoever looks at few cells needs no map: only the
tokens below them are upscaled, and of each only the one cell that is wanted, a sixteenth of the work.

Axes beyond those of `sam_cache.types`: N image tokens (g x g) make n = 16 N pixels of c channels; S cells of
one prompt's map.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sam_cache.model.linear import apply_trained


def read_maps(
    upscaling: nn.Sequential, image: Float[Tensor, "P N C"], hypers: Float[Tensor, "P M c"]
) -> Float[Tensor, "P M h w"]:
    """The maps (4 g, 4 g) of each prompt: inner products of its upscaled pixels with its M vectors."""
    conv, *later = upscaling
    quarters = _transpose_tokens(conv, image)
    # All that follows the first linear layer is cheap for its size, and made again in the backward pass
    # instead of kept: half the memory. On a CPU it is made for one prompt after the other, because pixels
    # that are still in its cache are read many times faster.
    together = 1 if image.device.type == "cpu" else len(image)
    finish = partial(checkpoint, _finish, later, use_reentrant=False, preserve_rng_state=False)
    maps = [finish(*block) for block in zip(quarters.split(together), hypers.split(together), strict=True)]
    return lay_out(torch.cat(maps))


class CellGroups(NamedTuple):
    """Cells of all prompts, sorted by which of their token's 4 x 4 places they take.

    `rows` are their tokens among all prompts', and `back` leads to the order in which they were asked for.
    """

    rows: Int[Tensor, "R"]
    back: Int[Tensor, "P S"]
    counts: list[int]


def group_cells(cells: Int[Tensor, "P S"], tokens: int) -> CellGroups:
    """Sort the cells y * w + x of each prompt's map, which has so many image tokens."""
    g = round(tokens**0.5)
    y, x = cells // (4 * g), cells % (4 * g)
    row = y // 4 * g + x // 4 + tokens * torch.arange(len(cells), device=cells.device).unsqueeze(1)
    first, second = 2 * (y // 2 % 2) + x // 2 % 2, 2 * (y % 2) + x % 2
    place = (4 * first + second).flatten()
    order = place.argsort(stable=True)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return CellGroups(row.flatten()[order], back.view_as(cells), place.bincount(minlength=16).tolist())


def read_cells(
    upscaling: nn.Sequential,
    tokens: Float[Tensor, "R C"],
    hypers: Float[Tensor, "P M c"],
    groups: CellGroups,
) -> Float[Tensor, "P M S"]:
    """`read_maps` at single cells, from the image tokens in `groups.rows`; no map is made."""
    conv, norm, activation, second_conv, second_activation = upscaling
    # Cells at the same place share their weights: in that order they are a few large matrix products, each
    # for only the quarter that is wanted.
    halves = [sum(groups.counts[i : i + 4]) for i in range(0, 16, 4)]
    pixels = activation(_normalise(norm, _make_quarters(conv, tokens.split(halves))))
    pixels = _make_quarters(second_conv, pixels.split(groups.counts))
    pixels = second_activation(pixels.index_select(0, groups.back.flatten()))
    return hypers @ pixels.unflatten(0, groups.back.shape).mT


def upscale(upscaling: nn.Sequential, image: Float[Tensor, "P N C"]) -> Float[Tensor, "P n c"]:
    """Each token's 16 pixels, in the order that `lay_out` undoes."""
    conv, *later = upscaling
    return _finish_pixels(later, _transpose_tokens(conv, image))


def lay_out(pixels: Float[Tensor, "P n M"]) -> Float[Tensor, "P M h w"]:
    """Arrange upscaled pixels as maps."""
    P, n, M = pixels.shape
    g = round((n // 16) ** 0.5)
    # Of a token's 4 x 4 pixels, the first convolution chose the halves and the second the quarters.
    maps = pixels.view(P, g, g, 2, 2, 2, 2, M).permute(0, 7, 1, 3, 5, 2, 4, 6)
    return maps.reshape(P, M, 4 * g, 4 * g)


def _finish(
    later: list[nn.Module], quarters: Float[Tensor, "P N 4 c1"], hypers: Float[Tensor, "P M c"]
) -> Float[Tensor, "P n M"]:
    return _finish_pixels(later, quarters) @ hypers.mT


def _finish_pixels(later: list[nn.Module], quarters: Float[Tensor, "P N 4 c1"]) -> Float[Tensor, "P n c"]:
    norm, activation, second_conv, second_activation = later
    pixels = activation(_normalise(norm, quarters))
    return second_activation(_transpose_tokens(second_conv, pixels)).flatten(1, -2)


def _normalise(norm: nn.Module, pixels: Float[Tensor, "*B c1"]) -> Float[Tensor, "*B c1"]:
    return F.layer_norm(pixels, norm.weight.shape, norm.weight, norm.bias, norm.eps)


def _transpose_tokens(conv: nn.ConvTranspose2d, tokens: Float[Tensor, "*B c"]) -> Float[Tensor, "*B 4 o"]:
    """A 2x2 transposed convolution of stride 2: each token makes its own four pixels, row by row."""
    weight = conv.weight.permute(2, 3, 1, 0).flatten(0, 2)
    return apply_trained(tokens, weight, conv.bias.repeat(4)).unflatten(-1, (4, -1))


def _make_quarters(conv: nn.ConvTranspose2d, groups: tuple[Float[Tensor, "_ c"], ...]) -> Float[Tensor, "_ o"]:
    """Of each token of group i only pixel i % 4 of those that `_transpose_tokens` makes."""
    weights = conv.weight.permute(2, 3, 1, 0).flatten(0, 1)
    return torch.cat([F.linear(group, weights[i % 4], conv.bias) for i, group in enumerate(groups)])
