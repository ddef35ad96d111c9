"""Weights for the models nobody has trained yet."""

from collections.abc import Callable
from math import sqrt

import torch
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn

from sam_cache.model.parts import is_of_hq_head, outline
from sam_cache.model.sizes import ModelSize


def fixed_weights(size: ModelSize, seed: int = 0) -> dict[str, Tensor]:
    """Random weights of SAM in the official layout, the same bits on every machine.

    The scales are PyTorch's defaults for each kind of layer, except that positions and biases,
    which upstream starts at zero, get a standard deviation of .02: every tensor matters.
    Only uniform draws and exact arithmetic are used, because normal draws differ in their last
    bits from one instruction set to the next and the digest is part of a store's identity.
    """
    return _draw_all(outline(size), seed)


def fresh_head(size: ModelSize, seed: int = 0) -> dict[str, Tensor]:
    """Random weights of HQ-SAM's head alone, drawn as `fixed_weights` are: where training it begins."""
    modules = outline(size, hq=True)
    return _draw_all(nn.ModuleDict({"mask_decoder": modules["mask_decoder"]}), seed, only=is_of_hq_head)


def _draw_all(modules: nn.Module, seed: int, only: Callable[[str], bool] = lambda key: True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for path, module in modules.named_modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if only(key := f"{path}.{name}"):
                state[key] = _draw(module, name, tensor.shape, generator)
    return state


def _draw(module: nn.Module, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    if name == "positional_encoding_gaussian_matrix":
        # Twelve uniform draws of variance 1/12 add up to nearly a normal one (Irwin-Hall).
        return sum(torch.rand(shape, generator=generator) for _ in range(12)) - 6
    uniform = (2 * torch.rand(shape, generator=generator) - 1) * sqrt(3)
    if name == "weight" and isinstance(module, (nn.LayerNorm, LayerNorm2d)):
        return 1 + 0.02 * uniform
    if name == "weight" and isinstance(module, nn.Embedding):
        return uniform
    if name == "weight":
        return uniform / sqrt(3 * shape[1:].numel())
    return 0.02 * uniform
