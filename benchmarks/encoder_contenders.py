"""The encoders that `encoder.py` compares: the published one, ways of ours, and segment-anything-fast."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sam_cache.model import SIZES, Encoder, fixed_weights, load_encoder, products
from sam_cache.model.attention import attend
from sam_cache.model.encoder import normalise_pixels
from sam_cache.model.parts import part_of

Encode = Callable[[Tensor], Tensor]  # images uint8 [batch, 3, side, side] to neck [batch, 256, side / 16, side / 16]

OURS = ("ours", "not_compiled", "channels", "kernel", "autotuned")


def make_encoder(model: str) -> Encoder:
    """In fp32 on the CPU; of the published sizes with random weights, which do not change the time."""
    size = SIZES[model]
    if size.packaged or model == "tiny":
        return load_encoder(model)
    return Encoder(size, part_of(fixed_weights(size), "image_encoder")).eval().requires_grad_(False)


def published(encoder: Encoder) -> Encode:
    """segment_anything's own forward, on pixels that were normalised for it."""

    def encode(pixels: Tensor) -> Tensor:
        inputs = normalise_pixels(pixels, whole(pixels), "sam")
        return encoder.vit(inputs.to(encoder.vit.pos_embed.dtype))

    return encode


def ours(encoder: Encoder) -> Encode:
    return lambda pixels: encoder(pixels, whole(pixels))["neck"]


def whole(pixels: Tensor) -> Tensor:
    return torch.full((len(pixels), 2), pixels.shape[-1], device=pixels.device)


def run_by_channels(block, tokens: Tensor) -> Tensor:
    """What `run_block` does where a gradient may be wanted."""
    attended = attend(block.attn, block.attn.qkv(block.norm1(tokens)), block.window_size, "channels")
    tokens = tokens + block.attn.proj(attended)
    return tokens + block.mlp(block.norm2(tokens))


def contenders_on_cpu(model: str) -> dict[str, Encode]:
    encoder = make_encoder(model)

    def encode_by_channels(pixels: Tensor) -> Tensor:
        encoder.compiled = run_by_channels
        try:
            return ours(encoder)(pixels)
        finally:
            encoder.compiled = None

    def encode_without_onednn(pixels: Tensor) -> Tensor:
        before, products.BY_ONEDNN = products.BY_ONEDNN, False
        try:
            return ours(encoder)(pixels)
        finally:
            products.BY_ONEDNN = before

    return {
        "published": published(encoder),
        "channels": encode_by_channels,
        "without_onednn": encode_without_onednn,
        "ours": ours(encoder),
    }


def makers_on_gpu(model: str, fast: Path | None) -> dict[str, Callable[[], Encode]]:
    """What makes each contender, when its turn comes: not all fit the memory at a time, and any may fail."""

    def moved(dtype: torch.dtype) -> Encoder:
        return make_encoder(model).to("cuda", dtype)

    def compiled(places: str, **options) -> Encode:
        encoder = moved(torch.bfloat16)
        encoder.compile_blocks(places, **options)
        return ours(encoder)

    return {
        "published": lambda: published(moved(torch.float32)),
        "published_bf16": lambda: published(moved(torch.bfloat16)),
        "fast": lambda: segment_anything_fast(model, fast),
        "not_compiled": lambda: ours(moved(torch.bfloat16)),
        "channels": lambda: compiled("channels"),
        "kernel": lambda: compiled("kernel"),
        "autotuned": lambda: compiled("kernel", mode="max-autotune-no-cudagraphs"),
    }


def segment_anything_fast(model: str, checkout: Path | None) -> Encode:
    if checkout is None:
        raise FileNotFoundError("no checkout of meta-pytorch/segment-anything-fast given: --segment-anything-fast")
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    from segment_anything_fast import sam_model_fast_registry

    sam = sam_model_fast_registry[model]()
    state = part_of(fixed_weights(SIZES[model]), "image_encoder")
    inner = getattr(sam.image_encoder, "_orig_mod", sam.image_encoder)
    inner.load_state_dict(state)
    sam.to("cuda").requires_grad_(False)

    def encode(pixels: Tensor) -> Tensor:
        return sam.image_encoder(normalise_pixels(pixels, whole(pixels), "sam").to(torch.bfloat16))

    return encode
