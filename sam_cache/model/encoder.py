"""The image encoder: uint8 pixels in, levels out."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sam_cache.errors import UsageError
from sam_cache.model.adapters.adapter import Adapter
from sam_cache.model.attention import Places, run_block
from sam_cache.model.checkpoints import State, load_state, own_fp32, state_digest
from sam_cache.model.parts import build_image_encoder, part_of
from sam_cache.model.sizes import ModelSize, size_of

Normalise = Literal["sam", "imagenet", "minmax"]
LEVELS = ("neck", "early")

# Per channel, in grey levels (segment_anything/build_sam.py). They are ImageNet's mean and standard
# deviation (.485 .456 .406 and .229 .224 .225) times 255, so `sam` and `imagenet` are one formula.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)


class Encoder(nn.Module):
    """SAM's image encoder with its preprocessing.

    `vit` is upstream's module, so its parameters have upstream's names. The compute dtype is that
    of the parameters: cast with `.to(torch.bfloat16)`. `levels` says what a call returns:
    name -> (channels, rows, columns), `neck` always among them. `early` are the tokens after the first
    block of global attention, before the neck and without a norm: what HQ-SAM's head sees of an image
    (Ke et al. 2023; `interm_embeddings[0]` of segment_anything_hq).
    `digest` is the sha256 of the weights as they were loaded.
    `adapter` is called around the blocks where there is one (`sam_cache.model.adapters.attach`).
    With `checkpointing` a backward keeps each block's input alone and computes the block again.
    `compiled` runs the blocks after `compile_blocks`.
    """

    def __init__(self, size: ModelSize, state: State, normalise: Normalise = "sam", levels: Sequence[str] = ("neck",)):
        super().__init__()
        if misfits := [name for name in levels if name not in LEVELS]:
            raise UsageError(f"--levels {','.join(levels)}: unknown level {misfits[0]!r}; use {' or '.join(LEVELS)}")
        with torch.device("meta"):
            self.vit = build_image_encoder(size)
        self.vit.load_state_dict(own_fp32(fit_positions(state, size)), assign=True)
        self.size = size
        self.normalise = normalise
        self.digest = state_digest(state)
        self.adapter: Adapter | None = None
        self.checkpointing = False
        self.compiled: Callable[[nn.Module, Tensor], Tensor] | None = None
        channels = {"neck": size.neck_channels, "early": size.width}
        self.levels = {name: (channels[name], size.grid, size.grid) for name in LEVELS if name in {"neck", *levels}}

    def forward(
        self, pixels: UInt8[Tensor, "I 3 S S"], content_hw: Int[Tensor, "I 2"]
    ) -> dict[str, Float[Tensor, "I C g g"]]:
        """Encode images that were resized to the square input and padded right and below.

        `content_hw` holds the rows and columns of each image that are not padding.
        """
        inputs = normalise_pixels(pixels, content_hw, self.normalise)
        inputs = inputs.to(self.vit.pos_embed.dtype)
        patches = self.vit.patch_embed(inputs)
        tokens = patches + self.vit.pos_embed
        prior = self._run(self.adapter.prepare, inputs, patches, tokens) if self.adapter else None
        found = {}
        for number in range(len(self.vit.blocks)):
            tokens = self._run(self._run_block, number, tokens, prior)
            if number == self.size.global_blocks[0] and "early" in self.levels:
                found["early"] = tokens.permute(0, 3, 1, 2)
        return {"neck": self.vit.neck(tokens.permute(0, 3, 1, 2))} | found

    def compile_blocks(self, places: Places = "kernel", **options: Any) -> None:
        """From now on run the blocks compiled, as a GPU wants it: for calls without gradients, without an adapter.

        The first call compiles, one windowed and one global block for all, and so does each call for another number
        of images. `places` is how attention gets its positions, `options` are torch.compile's.
        """

        def run_plainly(block: nn.Module, tokens: Tensor) -> Tensor:
            return run_block(block, tokens, places=places)

        self.compiled = torch.compile(run_plainly, dynamic=False, **options)

    def _run(self, function: Callable, *arguments: Any) -> Any:
        """Call it, keeping only the arguments for the backward where `checkpointing` says so."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)  # no chance in it
        return function(*arguments)

    def _run_block(self, number: int, tokens: Float[Tensor, "I g g C"], prior: Any) -> Float[Tensor, "I g g C"]:
        block, adapter = self.vit.blocks[number], self.adapter
        if adapter is None:
            return (self.compiled or run_block)(block, tokens)
        tokens = adapter.before_block(number, tokens, prior)
        tokens = run_block(block, tokens, lambda normed: adapter.added_qkv(number, normed, prior))
        return adapter.after_block(number, tokens, prior)


def load_encoder(
    name: str,
    checkpoint: Path | None = None,
    input_size: int | None = None,
    normalise: Normalise = "sam",
    levels: Sequence[str] = ("neck",),
) -> Encoder:
    """The encoder `name` in evaluation mode, without gradients, in fp32 on the CPU; it returns `levels`.

    `checkpoint` is the official file; `nano` comes with the package, `tiny` has fixed-seed weights.
    Another `input_size` than the model's own stretches the position tables.
    Raises CheckpointError for a file that is not exactly this model, UsageError for a bad name, size or level.
    """
    size = size_of(name)
    state = part_of(load_state(size, checkpoint), "image_encoder")
    return Encoder(size.at(input_size), state, normalise, levels).eval().requires_grad_(False)


def normalise_pixels(
    pixels: UInt8[Tensor, "I 3 S S"], content_hw: Int[Tensor, "I 2"], normalise: Normalise
) -> Float[Tensor, "I 3 S S"]:
    """Normalise in fp32, then set the padding to zero: upstream pads what is already normalised.

    `minmax` maps each image's own range to [0, 1] (MedSAM, pre_CT_MR.py).
    """
    side = torch.arange(pixels.shape[-1], device=pixels.device)
    content_hw = content_hw.to(pixels.device, non_blocking=True)
    rows, columns = (side < content_hw[:, axis, None] for axis in (0, 1))
    padding = ~(rows[:, None, :, None] & columns[:, None, None, :])
    values = pixels.float()  # a copy: what follows changes it in place, since fresh memory costs more than the sums
    if normalise == "minmax":
        low = values.masked_fill(padding, torch.inf).amin((1, 2, 3), keepdim=True)
        high = values.masked_fill(padding, -torch.inf).amax((1, 2, 3), keepdim=True)
        values.sub_(low).div_((high - low).clamp(min=1e-8))
    else:
        for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
            values[:, channel].sub_(mean).div_(std)
    return values.masked_fill_(padding, 0.0)


def fit_positions(state: State, size: ModelSize) -> State:
    """Stretch the absolute positions, and the relative ones of global blocks, to the size's grid.

    Bicubic for the absolute table, as timm resamples ViTs (timm/layers/pos_embed.py); linear for
    the relative ones, as upstream's `get_rel_pos` would at every call. Nothing changes at the
    model's own input size.
    """
    if state["pos_embed"].shape[1] == size.grid:
        return state
    fitted = dict(state)
    table = state["pos_embed"].permute(0, 3, 1, 2).float()
    table = F.interpolate(table, (size.grid, size.grid), mode="bicubic", antialias=True)
    fitted["pos_embed"] = table.permute(0, 2, 3, 1)
    for block in size.global_blocks:
        for axis in "hw":
            key = f"blocks.{block}.attn.rel_pos_{axis}"
            table = state[key].float().T[None]
            fitted[key] = F.interpolate(table, 2 * size.grid - 1, mode="linear")[0].T
    return fitted
