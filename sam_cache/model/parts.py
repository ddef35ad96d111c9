"""Upstream's three modules, built to a `ModelSize`: the only constructors of SAM parts here."""

from functools import partial

import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.mask_decoder import MLP
from torch import Tensor, nn

from sam_cache.model.sizes import ModelSize


def build_image_encoder(size: ModelSize, kind: type[nn.Module] = ImageEncoderViT) -> nn.Module:
    """`kind` is SAM's own class, or a fork of it that takes the same arguments."""
    return kind(
        img_size=size.input_size,
        patch_size=size.patch,
        embed_dim=size.width,
        depth=size.depth,
        num_heads=size.heads,
        out_chans=size.neck_channels,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=size.window,
        global_attn_indexes=size.global_blocks,
    )


def build_prompt_encoder(size: ModelSize) -> PromptEncoder:
    return PromptEncoder(
        embed_dim=size.neck_channels,
        image_embedding_size=(size.grid, size.grid),
        input_image_size=(size.input_size, size.input_size),
        mask_in_chans=16,
    )


# What HQ-SAM adds to the mask decoder, by its names (segment_anything_hq/modeling/mask_decoder_hq.py).
HQ_HEAD = ("hf_token", "hf_mlp", "compress_vit_feat", "embedding_encoder", "embedding_maskfeature")


def build_mask_decoder(size: ModelSize, hq: bool = False) -> MaskDecoder:
    """SAM's decoder; with `hq` the layers of HQ-SAM's head stand beside its own."""
    decoder = MaskDecoder(
        transformer_dim=size.neck_channels,
        transformer=TwoWayTransformer(
            depth=size.decoder_depth,
            embedding_dim=size.neck_channels,
            num_heads=size.decoder_heads,
            mlp_dim=size.decoder_mlp,
        ),
        iou_head_hidden_dim=size.decoder_score_width,
    )
    if hq:
        for name, layer in _build_hq_head(size.width, size.neck_channels).items():
            decoder.add_module(name, layer)
    return decoder


def _build_hq_head(width: int, channels: int) -> dict[str, nn.Module]:
    """The layers of `HQ_HEAD` for an encoder of `width` and a neck of `channels`."""
    small = channels // 8  # of the decoder's upscaled maps
    return {
        "hf_token": nn.Embedding(1, channels),
        "hf_mlp": MLP(channels, channels, small, 3),
        "compress_vit_feat": _upscale_four_times(width, channels, small),
        "embedding_encoder": _upscale_four_times(channels, channels // 4, small),
        "embedding_maskfeature": nn.Sequential(
            nn.Conv2d(small, channels // 4, 3, padding=1),
            LayerNorm2d(channels // 4),
            nn.GELU(),
            nn.Conv2d(channels // 4, small, 3, padding=1),
        ),
    }


def _upscale_four_times(channels: int, between: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.ConvTranspose2d(channels, between, 2, stride=2),
        LayerNorm2d(between),
        nn.GELU(),
        nn.ConvTranspose2d(between, out, 2, stride=2),
    )


def outline(size: ModelSize, hq: bool = False) -> nn.ModuleDict:
    """A whole SAM without storage (on the meta device), its keys those of an official checkpoint.

    With `hq` those of an official checkpoint of HQ-SAM.
    """
    with torch.device("meta"):
        return nn.ModuleDict(
            {
                "image_encoder": build_image_encoder(size),
                "prompt_encoder": build_prompt_encoder(size),
                "mask_decoder": build_mask_decoder(size, hq),
            }
        )


def is_of_hq_head(key: str) -> bool:
    """Whether a key of a checkpoint belongs to HQ-SAM's head."""
    return key.startswith(tuple(f"mask_decoder.{name}." for name in HQ_HEAD))


def part_of(state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """The entries under `part.`, without that prefix."""
    prefix = f"{part}."
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
