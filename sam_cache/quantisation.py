"""Levels as int8, with a scale and an offset for every channel of every image.

    value = quantised * scale + offset

`NAME` is stored beside `NAME_scale` and `NAME_offset`, both (I, C, 1, 1), so that plain broadcasting undoes
it, in any language. A scale and an offset of its own for each channel is what keeps the error small: the
channels of a transformer's tokens differ in range by orders of magnitude, and many do not centre on zero.
"""

import torch
from jaxtyping import Float, Int8, Shaped
from torch import Tensor

COMPANIONS = ("scale", "offset")
LARGEST = 127  # -128 stays unused: it is the fill value of a hole


def quantise(
    value: Float[Tensor, "C H W"],
) -> tuple[Int8[Tensor, "C H W"], Float[Tensor, "C 1 1"], Float[Tensor, "C 1 1"]]:
    """One image's level as int8, its scale and its offset, both fp32.

    The offset is the middle of a channel's range and the largest distance from it maps to 127, so the error
    is at most half a scale. A constant channel is kept exactly. Raises ValueError for a value that is not
    finite, or a range that fp32 cannot hold.
    """
    value = value.float()
    low, high = value.amin((1, 2), keepdim=True), value.amax((1, 2), keepdim=True)
    offset = low / 2 + high / 2
    scale = (high / 2 - low / 2) / LARGEST
    if not (torch.isfinite(scale) & torch.isfinite(offset)).all():
        raise ValueError("not finite")
    # In place: fresh memory for each step costs more than all of them.
    steps = (value - offset).div_(scale.clamp(min=torch.finfo(scale.dtype).tiny))
    return steps.round_().clamp_(-LARGEST, LARGEST).to(torch.int8), scale, offset


def dequantise(levels: dict[str, Shaped[Tensor, "I _ _ _"]], name: str) -> Float[Tensor, "I _ _ _"]:
    """Level `name` as floating numbers, fp32 where it is int8; another type stays as it is."""
    level = levels[name]
    if level.dtype != torch.int8:
        return level
    return torch.addcmul(levels[f"{name}_offset"], level.float(), levels[f"{name}_scale"])
