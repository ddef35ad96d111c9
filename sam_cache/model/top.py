"""SAM behind its image encoder: what is trained from the store."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sam_cache.errors import CheckpointError
from sam_cache.model.checkpoints import State, load_state, own_fp32
from sam_cache.model.decoder import Masks, decode, own_images, share_images
from sam_cache.model.hq import HqOutput, decode_hq, find_detail
from sam_cache.model.parts import HQ_HEAD, build_mask_decoder, build_prompt_encoder, is_of_hq_head
from sam_cache.model.sizes import ModelSize, size_of
from sam_cache.model.weights import fresh_head
from sam_cache.quantisation import dequantise
from sam_cache.types import Batch, Prompts

Levels = dict[str, Float[Tensor, "I _ _ _"]]  # of images, as an encoder gives them
Prepared = dict[str, Float[Tensor, "I _ _ _"]]  # what prompts need of images: `neck`, for the HQ head `detail`

# What can be trained by itself, by the beginning of its parameters' names; the longest one decides.
# `no-mask` is the embedding that stands for 'no mask given', which SAM-Adapter trains too; `head` is HQ-SAM's.
PARTS = {
    "encoder": ("image_encoder.",),
    "neck": ("image_encoder.vit.neck.",),
    "adapter": ("image_encoder.adapter.",),
    "prompt": ("prompt_encoder.",),
    "no-mask": ("prompt_encoder.no_mask_embed.",),
    "decoder": ("mask_decoder.",),
    "head": tuple(f"mask_decoder.{name}." for name in HQ_HEAD),
}


class Top(nn.Module):
    """Upstream's prompt encoder and mask decoder under upstream's names, called in one batch.

    With `hq` the decoder has HQ-SAM's head, and says which masks it answers with. `state` may hold a head
    that is not asked for, and not lack one that is.
    """

    def __init__(self, size: ModelSize, state: State, hq: HqOutput | None = None):
        super().__init__()
        self.size, self.hq = size, hq
        with torch.device("meta"):
            self.prompt_encoder = build_prompt_encoder(size)
            self.mask_decoder = build_mask_decoder(size, hq is not None)
        if hq is None:
            state = {key: tensor for key, tensor in state.items() if not is_of_hq_head(key)}
        self.load_state_dict(own_fp32(state), assign=True)

    @property
    def levels(self) -> tuple[str, ...]:
        """The levels of an image that are needed to ask about it."""
        return levels_of(self.hq)

    def encode(self, batch: Batch) -> Prepared:
        """What `forward` needs of the batch's images, from the levels that they came with."""
        return self.prepare({name: dequantise(batch.levels, name) for name in self.levels})

    def prepare(self, levels: Levels) -> Prepared:
        """Do once for an image what is the same for all its prompts."""
        if self.hq is None:
            return {"neck": levels["neck"]}
        dtype = self.mask_decoder.iou_token.weight.dtype
        # In one order in memory, so that convolutions round alike for levels cached and live.
        neck, early = (levels[name].to(dtype).contiguous() for name in ("neck", "early"))
        return {"neck": neck, "detail": find_detail(self.mask_decoder, neck, early)}

    def forward(
        self, images: Prepared, prompts: Prompts, multimask: bool, cells: Int[Tensor, "P S"] | None = None
    ) -> Masks:
        """Masks (P, 3, h, w) if `multimask`, else (P, 1, h, w), in the order of `prompts`; of the HQ head always one.

        `images` are as `encode` gives them; `images["neck"]` holds I of them in any floating dtype.
        `prompts.image_index` names them in any order and number; points and boxes are in the input frame.
        A mask prompt makes the image another one for its prompt alone, so that nothing is shared between
        such prompts.

        With `cells` of the maps, y * w + x, only the logits of each prompt's own S cells: (P, M, S). Without
        the HQ head no map is made then; the head's 3x3 convolutions need their neighbours, so its maps are
        made all the same, and read at the cells.
        """
        neck = images["neck"].to(self.mask_decoder.iou_token.weight.dtype)
        if len(prompts) == 0:
            count = 3 if multimask and self.hq is None else 1
            shape = (self.size.mask_size, self.size.mask_size) if cells is None else cells.shape[1:]
            return Masks(neck.new_zeros(0, count, *shape), neck.new_zeros(0, count))
        # Positions are sines of coordinates times frequencies: half precision would ruin them.
        with torch.autocast(neck.device.type, enabled=False):
            position = self.prompt_encoder.get_dense_pe()[0].to(neck.dtype)
            groups = [(group, self._embed(group)) for group in same_tokens(prompts)]
        shared = None
        if not all(group.masked for group, _ in groups):
            shared = share_images(self.mask_decoder, neck, self.prompt_encoder.no_mask_embed.weight, position)
        outputs = []
        for group, sparse in groups:
            index, asked = group.prompts.image_index, shared
            if group.masked:
                masks = group.prompts.masks.to(neck.dtype)
                asked = own_images(self.prompt_encoder.mask_downscaling, neck, index, masks, position)
            places = None if cells is None else cells[group.place]
            if self.hq is None:
                outputs.append(decode(self.mask_decoder, asked, index, sparse, multimask, places))
            else:
                detail = images["detail"][index]
                outputs.append(decode_hq(self.mask_decoder, asked, index, sparse, multimask, detail, self.hq, places))
        if len(outputs) == 1:
            return outputs[0]
        order = torch.cat([group.place for group, _ in groups]).argsort()
        return Masks(*(torch.cat(parts)[order] for parts in zip(*outputs, strict=True)))

    def _embed(self, group: "Group") -> Float[Tensor, "P K C"]:
        """The tokens of the group's prompts."""
        prompts, points, boxes = group.prompts, None, None
        if len(prompts.labels):
            points = prompts.points_xy_input.view(len(prompts), -1, 2), prompts.labels.view(len(prompts), -1)
        if group.boxed:
            boxes = prompts.boxes_xyxy_input
        if points is None and boxes is None:
            return prompts.points_xy_input.new_empty(len(prompts), 0, self.size.neck_channels)
        return self.prompt_encoder(points=points, boxes=boxes, masks=None)[0]


class Group(NamedTuple):
    """Prompts with equally many points, all of them with a box or none, all with a mask or none; and their places."""

    place: Int[Tensor, "Q"]
    prompts: Prompts
    boxed: bool
    masked: bool


def same_tokens(prompts: Prompts) -> Iterator[Group]:
    """Split prompts into groups that share tensors.

    Prompts of unequal token counts could share one only with padding, and padding attends.
    """
    signature = 4 * prompts.offsets.diff() + 2 * prompts.has_box + prompts.has_mask
    for value in signature.unique().tolist():
        place = (signature == value).nonzero()[:, 0]
        yield Group(place, prompts.select(place), bool(value & 2), bool(value & 1))


def levels_of(hq: HqOutput | None) -> tuple[str, ...]:
    """The levels of an image that a top needs, with the HQ head or without."""
    return ("neck",) if hq is None else ("neck", "early")


def load_top(
    name: str, checkpoint: Path | None = None, input_size: int | None = None, hq: HqOutput | None = None
) -> Top:
    """The untouched top of model `name`; arguments and errors are those of `load_encoder`.

    With `hq` it has HQ-SAM's head where the file has one.
    """
    size = size_of(name)
    state = load_state(size, checkpoint)
    top = {key: tensor for key, tensor in state.items() if not key.startswith("image_encoder.")}
    return Top(size.at(input_size), top, hq if any(map(is_of_hq_head, top)) else None)


def add_head(top: Top, hq: HqOutput, seed: int) -> Top:
    """The same top with a fresh HQ head, drawn from `seed`."""
    return Top(top.size, fresh_head(top.size, seed) | top.state_dict(), hq)


def freeze(network: nn.Module, train: set[str], mask_prompts: bool = False) -> None:
    """Let gradients reach only the parts named in `train`, out of `PARTS`.

    What can get no gradient must not be trained: the layers that embed a mask prompt without
    `mask_prompts`, and those that make SAM's masks where the HQ head alone answers.
    """
    unreached = [] if mask_prompts else ["prompt_encoder.mask_downscaling."]
    unreached += ["mask_decoder.output_hypernetworks_mlps."] if network.hq == "hq" else []
    for name, parameter in network.named_parameters():
        trained = "adapter" in train if ".low_rank_" in name else not train.isdisjoint(parts_of(name))
        parameter.requires_grad_(trained and not name.startswith(tuple(unreached)))


def parts_of(name: str) -> tuple[str, ...]:
    """The parts a parameter belongs to: one, except that `no-mask` is within `prompt`."""
    starts = [(len(start), part) for part, found in PARTS.items() for start in found if name.startswith(start)]
    nearest = max(starts)[1]
    return ("prompt", "no-mask") if nearest == "no-mask" else (nearest,)


def top_to_bytes(top: Top) -> bytes:
    """A safetensors file of the weights that says which model they are."""
    # One metadata entry: safetensors writes several in random order.
    head = {} if top.hq is None else {"hq": top.hq}
    identity = json.dumps({"size": top.size.name, "input_size": top.size.input_size} | head)
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in top.state_dict().items()}
    return safetensors.torch.save(state, metadata={"samcache": identity})


def top_from_bytes(blob: bytes) -> Top:
    """Undo `top_to_bytes`. Raises CheckpointError."""
    try:
        header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
        identity = json.loads(header["__metadata__"]["samcache"])
        size = size_of(identity["size"]).at(identity["input_size"])
        return Top(size, safetensors.torch.load(blob), identity.get("hq"))
    except (ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        problem = " ".join(str(error).split())
        raise CheckpointError(f"no SAM top in these {len(blob)} bytes: {problem}; read them again") from None
