"""SAM behind its image encoder: what is trained from the store."""

import json
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sam_cache.errors import CheckpointError
from sam_cache.model.checkpoints import State, load_state, own_fp32
from sam_cache.model.decoder import Masks, decode, share_images
from sam_cache.model.parts import build_mask_decoder, build_prompt_encoder
from sam_cache.model.sizes import ModelSize, size_of
from sam_cache.types import Batch, Prompts

Levels = dict[str, Float[Tensor, "I _ _ _"]]

# What can be trained by itself, by the beginning of its parameters' names; the longest one decides.
# `no-mask` is the embedding that stands for 'no mask given', which SAM-Adapter trains too.
PARTS = {
    "encoder": "image_encoder.",
    "neck": "image_encoder.vit.neck.",
    "adapter": "image_encoder.adapter.",
    "prompt": "prompt_encoder.",
    "no-mask": "prompt_encoder.no_mask_embed.",
    "decoder": "mask_decoder.",
}


class Top(nn.Module):
    """Upstream's prompt encoder and mask decoder under upstream's names, called in one batch."""

    def __init__(self, size: ModelSize, state: State):
        super().__init__()
        self.size = size
        with torch.device("meta"):
            self.prompt_encoder = build_prompt_encoder(size)
            self.mask_decoder = build_mask_decoder(size)
        self.load_state_dict(own_fp32(state), assign=True)

    def encode(self, batch: Batch) -> Levels:
        """The levels of the batch's images: here those it came with."""
        return batch.levels

    def forward(self, levels: Levels, prompts: Prompts, multimask: bool) -> Masks:
        """Masks (P, 3, h, w) if `multimask`, else (P, 1, h, w), in the order of `prompts`.

        `levels["neck"]` holds I images in any floating dtype. `prompts.image_index` names them in
        any order and number; points and boxes are in the input frame. A mask prompt makes the image
        another one for its prompt alone, so that nothing is shared between such prompts.
        """
        neck = levels["neck"].to(self.mask_decoder.iou_token.weight.dtype)
        if len(prompts) == 0:
            masks = neck.new_zeros(0, 3 if multimask else 1, self.size.mask_size, self.size.mask_size)
            return Masks(masks, masks[..., 0, 0])
        # Positions are sines of coordinates times frequencies: half precision would ruin them.
        with torch.autocast(neck.device.type, enabled=False):
            position = self.prompt_encoder.get_dense_pe()[0].to(neck.dtype)
            groups = [(place, group.image_index, self._embed(group)) for place, group in same_tokens(prompts)]
        if prompts.masks is None:
            shared = share_images(self.mask_decoder, neck, self.prompt_encoder.no_mask_embed.weight, position)
        outputs = []
        for place, index, sparse in groups:
            if prompts.masks is not None:
                dense = self.prompt_encoder.mask_downscaling(prompts.masks[place].unsqueeze(1).to(neck.dtype))
                shared = share_images(self.mask_decoder, neck[index], dense.flatten(2).mT, position)
                index = torch.arange(len(index), device=index.device)
            outputs.append(decode(self.mask_decoder, shared, index, sparse, multimask))
        if len(outputs) == 1:
            return outputs[0]
        order = torch.cat([place for place, _, _ in groups]).argsort()
        return Masks(*(torch.cat(parts)[order] for parts in zip(*outputs, strict=True)))

    def _embed(self, prompts: Prompts) -> Float[Tensor, "P K C"]:
        """The tokens of prompts that have equally many points and all a box or none."""
        points = boxes = None
        if len(prompts.labels):
            points = prompts.points_xy_input.view(len(prompts), -1, 2), prompts.labels.view(len(prompts), -1)
        if prompts.has_box[0]:
            boxes = prompts.boxes_xyxy_input
        if points is None and boxes is None:
            return prompts.points_xy_input.new_empty(len(prompts), 0, self.size.neck_channels)
        return self.prompt_encoder(points=points, boxes=boxes, masks=None)[0]


def same_tokens(prompts: Prompts) -> Iterator[tuple[Int[Tensor, "Q"], Prompts]]:
    """Split prompts by their number of points and by having a box, each part with its places.

    Prompts of unequal token counts could share a tensor only with padding, and padding attends.
    """
    signature = 2 * prompts.offsets.diff() + prompts.has_box
    for value in signature.unique().tolist():
        place = (signature == value).nonzero()[:, 0]
        yield place, prompts.select(place)


def load_top(name: str, checkpoint: Path | None = None, input_size: int | None = None) -> Top:
    """The untouched top of model `name`; arguments and errors are those of `load_encoder`."""
    size = size_of(name)
    state = load_state(size, checkpoint)
    top = {key: tensor for key, tensor in state.items() if not key.startswith("image_encoder.")}
    return Top(size.at(input_size), top)


def freeze(network: nn.Module, train: set[str], mask_prompts: bool = False) -> None:
    """Let gradients reach only the parts named in `train`, out of `PARTS`.

    The layers that embed a mask prompt are trained only with `mask_prompts`: a parameter that can get
    no gradient must not be trained.
    """
    for name, parameter in network.named_parameters():
        trained = "adapter" in train if ".low_rank_" in name else not train.isdisjoint(parts_of(name))
        if name.startswith("prompt_encoder.mask_downscaling."):
            trained = trained and mask_prompts
        parameter.requires_grad_(trained)


def parts_of(name: str) -> tuple[str, ...]:
    """The parts a parameter belongs to: one, except that `no-mask` is within `prompt`."""
    nearest = max((part for part, start in PARTS.items() if name.startswith(start)), key=lambda part: len(PARTS[part]))
    return ("prompt", "no-mask") if nearest == "no-mask" else (nearest,)


def top_to_bytes(top: Top) -> bytes:
    """A safetensors file of the weights that says which model they are."""
    # One metadata entry: safetensors writes several in random order.
    identity = json.dumps({"size": top.size.name, "input_size": top.size.input_size})
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in top.state_dict().items()}
    return safetensors.torch.save(state, metadata={"samcache": identity})


def top_from_bytes(blob: bytes) -> Top:
    """Undo `top_to_bytes`. Raises CheckpointError."""
    try:
        header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
        identity = json.loads(header["__metadata__"]["samcache"])
        return Top(size_of(identity["size"]).at(identity["input_size"]), safetensors.torch.load(blob))
    except (ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        problem = " ".join(str(error).split())
        raise CheckpointError(f"no SAM top in these {len(blob)} bytes: {problem}; read them again") from None
