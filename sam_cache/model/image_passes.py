"""The two passes of attention over the image tokens of every prompt, with gradients made by hand.

Autograd would go over the thousands of tokens once for every operation, and keep what comes between.
Here a CPU does one prompt after the other, all of a pass while the prompt's tokens are in its cache; the
gradients of one pass are added up inside matrix products; and what is cheap to make again is not kept:
less than half of the memory, and a third of the time where memory is fresh. A GPU does all prompts at once.

Axes are those of `sam_cache.model.decoder`; t are the tokens of a prompt times heads.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from sam_cache.model.products import multiply


class ReadImage(torch.autograd.Function):
    """`softmax(added + queries @ image.mT) @ image`, and the tokens in `rows` of all prompts' tokens, if asked for.

    Those come along because their gradient is added to the image's own in place, a pass less.
    """

    @staticmethod
    def forward(
        ctx,
        added: Float[Tensor, "P t N"],
        queries: Float[Tensor, "P t C"],
        image: Float[Tensor, "P N C"],
        rows: Int[Tensor, "R"] | None,
    ) -> tuple[Float[Tensor, "P t C"], Float[Tensor, "R C"] | None]:
        weights, context = torch.empty_like(added), torch.empty_like(queries)
        with torch.autocast(image.device.type, enabled=False):
            for b in _blocks(image, len(image)):
                torch.softmax(_inner(queries[b], image[b]).add_(added[b]), dim=-1, out=weights[b])
                torch.bmm(weights[b], image[b], out=context[b])
        ctx.save_for_backward(queries, weights, image, rows)
        return context, None if rows is None else image.flatten(0, 1).index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, of_context: Tensor, of_rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor, None]:
        queries, weights, image, rows = ctx.saved_tensors
        of_scores, of_queries, of_image = map(torch.empty_like, (weights, queries, image))
        with torch.autocast(image.device.type, enabled=False):
            for b in _blocks(image, len(image)):
                of_weights = _inner(of_context[b], image[b])
                _softmax_backward(of_weights, weights[b], -1, of_scores[b])
                torch.bmm(of_scores[b], image[b], out=of_queries[b])
                # What comes through the scores and what through the values, added up inside one product.
                both = torch.cat([of_scores[b], weights[b]], dim=1), torch.cat([queries[b], of_context[b]], dim=1)
                torch.bmm(both[0].mT, both[1], out=of_image[b])
        if rows is not None:
            of_image.flatten(0, 1).index_add_(0, rows, of_rows)
        return of_scores, of_queries, of_image, None


class UpdateImage(torch.autograd.Function):
    """`layer_norm(image + softmax(added + keys @ image.mT).mT @ told)`; the softmax is over the tokens of a head.

    Without `keys` the scores are `added` alone. With `index` the prompts share images: I of them, and prompt p has
    `image[index[p]]`.
    """

    @staticmethod
    def forward(
        ctx,
        added: Float[Tensor, "P t N"],
        keys: Float[Tensor, "P t C"] | None,
        image: Float[Tensor, "B N C"],
        index: Int[Tensor, "P"] | None,
        told: Float[Tensor, "P t C"],
        scale: Float[Tensor, "C"],
        shift: Float[Tensor, "C"],
        eps: float,
        heads: int,
    ) -> Float[Tensor, "P N C"]:
        count, _, tokens = added.shape
        weights, updated = torch.empty_like(added), image.new_empty(count, *image.shape[1:])
        mean, deviation = (scale.new_empty(count, tokens, 1) for _ in range(2))
        with torch.autocast(image.device.type, enabled=False):
            for b in _blocks(image, count):
                scores = added[b] if keys is None else _inner(keys[b], image[b]).add_(added[b])
                by_head = scores.unflatten(1, (heads, -1))
                torch.softmax(by_head, dim=2, out=weights[b].view_as(by_head))
                summed = _outer(weights[b], told[b]).add_(_take(image, index, b)).to(scale.dtype)
                updated[b], mean[b], deviation[b] = torch.native_layer_norm(summed, scale.shape, scale, shift, eps)
        ctx.save_for_backward(keys, weights, image, index, told, scale, shift, mean, deviation)
        ctx.heads = heads
        return updated

    @staticmethod
    @once_differentiable
    def backward(ctx, of_updated: Tensor) -> tuple[Tensor | None, ...]:
        keys, weights, image, index, told, scale, shift, mean, deviation = ctx.saved_tensors
        of_scores, of_told, of_scale, of_shift = map(torch.zeros_like, (weights, told, scale, shift))
        of_keys = None if keys is None else torch.empty_like(keys)
        of_image = torch.empty_like(image) if index is None else torch.zeros_like(image)
        with torch.autocast(image.device.type, enabled=False):
            for b in _blocks(image, len(weights)):
                summed = _outer(weights[b], told[b]).add_(_take(image, index, b)).to(scale.dtype)
                statistics = scale.shape, mean[b], deviation[b], scale, shift, (True, True, True)
                of_summed, *of_norm = torch.ops.aten.native_layer_norm_backward(
                    of_updated[b].to(scale.dtype), summed, *statistics
                )
                of_scale += of_norm[0]
                of_shift += of_norm[1]
                of_summed = of_summed.to(image.dtype)
                torch.bmm(weights[b], of_summed, out=of_told[b])
                of_weights, by_head = _inner(told[b], of_summed), weights[b].unflatten(1, (ctx.heads, -1))
                _softmax_backward(of_weights.view_as(by_head), by_head, 2, of_scores[b].view_as(by_head))
                if keys is not None:
                    torch.bmm(of_scores[b], image[b], out=of_keys[b])
                    torch.add(of_summed, _outer(of_scores[b], keys[b]), out=of_image[b])
                elif index is None:
                    of_image[b] = of_summed
                elif len(index[b]) > 1:
                    of_image.index_add_(0, index[b], of_summed)
                else:
                    of_image[int(index[b])] += of_summed[0]
        return of_scores, of_keys, of_image, None, of_told, of_scale, of_shift, None, None


def _blocks(image: Tensor, prompts: int) -> Iterator[slice]:
    together = 1 if image.device.type == "cpu" else prompts
    return (slice(start, start + together) for start in range(0, prompts, together))


def _inner(x: Float[Tensor, "b m K"], y: Float[Tensor, "b n K"]) -> Float[Tensor, "b m n"]:
    """`x @ y.mT`, for a single prompt on a CPU by the library that is faster at it."""
    if len(x) == 1 and x.device.type == "cpu" and x.dtype == torch.float32:
        return multiply(x[0], y[0]).unsqueeze(0)
    return x @ y.mT


def _outer(x: Float[Tensor, "b K m"], y: Float[Tensor, "b K n"]) -> Float[Tensor, "b m n"]:
    """`x.mT @ y`."""
    return _inner(x.mT, y.mT)


def _take(image: Float[Tensor, "B N C"], index: Int[Tensor, "P"] | None, block: slice) -> Float[Tensor, "b N C"]:
    """The images of a block of prompts, those of a single one without a copy."""
    if index is None:
        return image[block]
    chosen = index[block]
    return image[chosen] if len(chosen) > 1 else image[int(chosen)].unsqueeze(0)


def _softmax_backward(of_weights: Tensor, weights: Tensor, dim: int, of_scores: Tensor) -> None:
    torch.ops.aten._softmax_backward_data.out(of_weights, weights, dim, of_weights.dtype, grad_input=of_scores)
