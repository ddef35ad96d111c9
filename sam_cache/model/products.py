"""Products of matrices on a CPU, by the faster of the two libraries that come with PyTorch."""

import platform

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

# What torch.compile emits for a linear layer on a CPU. Elsewhere than on x86 `F.linear` takes oneDNN by itself.
BY_ONEDNN = platform.machine() in ("x86_64", "AMD64") and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def multiply(
    rows: Float[Tensor, "... K"],
    weight: Float[Tensor, "N K"],
    bias: Float[Tensor, " N"] | None = None,
    gelu: bool = False,
) -> Float[Tensor, "... N"]:
    """`F.linear` and then, if asked for, the exact GELU; on a CPU, in fp32, without gradients.

    By oneDNN, where `F.linear` takes MKL: MKL leaves half of the vector units idle on processors that are not
    Intel's, and the GELU is applied while its operand is in the cache.
    """
    if BY_ONEDNN and torch.backends.mkldnn.enabled:
        # Of operands with gaps oneDNN makes the product by a plain loop, hundreds of times slower.
        rows, weight = rows.contiguous(), weight.contiguous()
        return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "gelu" if gelu else "none", [], "none")
    product = F.linear(rows, weight, bias)
    return F.gelu(product) if gelu else product


def apply_linear(layer: nn.Linear, rows: Float[Tensor, "... K"], gelu: bool = False) -> Float[Tensor, "... N"]:
    """`multiply` by a layer's weight; a layer that adds to its weight, as low-rank ones do, is called as it is."""
    if type(layer) is nn.Linear:
        return multiply(rows, layer.weight, layer.bias, gelu)
    return F.gelu(layer(rows)) if gelu else layer(rows)
