"""Upstream's three modules, built to a `ModelSize`: the only constructors of SAM parts here."""

from functools import partial

import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, TwoWayTransformer
from torch import Tensor, nn

from sam_cache.model.sizes import ModelSize


def build_image_encoder(size: ModelSize) -> ImageEncoderViT:
    return ImageEncoderViT(
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


def build_mask_decoder(size: ModelSize) -> MaskDecoder:
    return MaskDecoder(
        transformer_dim=size.neck_channels,
        transformer=TwoWayTransformer(
            depth=size.decoder_depth,
            embedding_dim=size.neck_channels,
            num_heads=size.decoder_heads,
            mlp_dim=size.decoder_mlp,
        ),
        iou_head_hidden_dim=size.decoder_score_width,
    )


def outline(size: ModelSize) -> nn.ModuleDict:
    """A whole SAM without storage (on the meta device), its keys those of an official checkpoint."""
    with torch.device("meta"):
        return nn.ModuleDict(
            {
                "image_encoder": build_image_encoder(size),
                "prompt_encoder": build_prompt_encoder(size),
                "mask_decoder": build_mask_decoder(size),
            }
        )


def part_of(state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """The entries under `part.`, without that prefix."""
    prefix = f"{part}."
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
