"""A linear layer of very many rows, in training too by the faster library for products."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sam_cache.model.products import multiply


def project(layer: nn.Linear, rows: Float[Tensor, "*B K"]) -> Float[Tensor, "*B N"]:
    """`layer(rows)` by `apply_trained`."""
    return apply_trained(rows, layer.weight, layer.bias)


def apply_trained(
    rows: Float[Tensor, "*B K"], weight: Float[Tensor, "N K"], bias: Float[Tensor, "N"]
) -> Float[Tensor, "*B N"]:
    """`F.linear`, with gradients; on a CPU, in fp32, most of both passes by `sam_cache.model.products.multiply`."""
    if rows.device.type == "cpu" and rows.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):
        return _Linear.apply(rows, weight, bias)
    return F.linear(rows, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return multiply(rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        of_rows = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_rows = multiply(gradient, weight.mT)
        if ctx.needs_input_grad[1]:
            # oneDNN would want both operands transposed, which costs what it saves.
            of_weight = gradient.flatten(0, -2).mT @ rows.flatten(0, -2)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.flatten(0, -2).sum(dim=0)
        return of_rows, of_weight, of_bias
