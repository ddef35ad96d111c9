"""SAM-Adapter: what an image's high frequencies and patches say, added to the tokens around every block."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sam_cache.errors import UsageError
from sam_cache.model.adapters.adapter import Adapter
from sam_cache.model.sizes import ModelSize

Variant = Literal["official", "between"]
Start = Literal["official", "identity"]

# `between` has one width for every model: a quarter of vit_b's (Kyyle2114's run_sa.py).
BETWEEN_WIDTH = 192


@dataclass(frozen=True, slots=True)
class SamAdapterKnobs:
    """How a `SamAdapter` is built.

    `variant`: `official` adds before every block, `between` before the first and after every block.
    `tune_width`: channels of the two projections that are summed; by default the encoder's width over
    `scale_factor` for `official`, which `between` ignores, and 192 for `between`.
    `bottleneck`: channels that every place of `between` narrows to; `official` ignores it.
    `mask_ratio`: share of the spectrum, a square around frequency zero, that is removed.
    `start`: `official` draws all weights as the official code does, so the encoder's output changes at
    once; `identity` then sets the last projection to zero, so training starts from the output of the bare
    encoder.

    Raises UsageError for a number out of range.
    """

    variant: Variant = "official"
    scale_factor: int = 32
    tune_width: int | None = None
    bottleneck: int = 32
    mask_ratio: float = 0.25
    start: Start = "official"

    def __post_init__(self) -> None:
        for flag, number in (
            ("scale-factor", self.scale_factor),
            ("tune-width", self.tune_width),
            ("bottleneck", self.bottleneck),
        ):
            if number is not None and number < 1:
                raise UsageError(f"--sa-{flag} {number}: must be at least 1")
        if not 0 <= self.mask_ratio < 1:
            raise UsageError(
                f"--sa-mask-ratio {self.mask_ratio}: must be at least 0 and below 1; the usual share is 0.25"
            )


class SamAdapter(Adapter):
    """Task information from pixels and patches, narrowed per place and widened by one shared projection.

    Two sources are projected to T channels and summed: `frequency_tune` sees the high frequencies of
    each patch, `embedding_tune` the embedded patch. A place is where the tokens get something added:
    `up_projection(gelu(place_tunes[place](sum)))`.

    variant    embedding_tune sees           T       place_tunes   places
    official   patches without positions     C / 32  T to T        before each block
    between    patches with their positions  192     T to 32       before block 0, after each block

    official: Chen et al. 2023 (SAM-Adapter) and the `PromptGenerator` of tianrun-chen/SAM-Adapter-PyTorch.
    What it trains in the encoder (63,312, 116,544 and 186,960 parameters for vit_b, vit_l and vit_h) is every
    layer here, each with a bias: there they are `prompt_generator`, `embedding_generator`,
    `lightweight_mlp_i` and `shared_mlp`. That code hands `embedding_generator` its (I, g, g, C) patches
    reshaped to (I, C, g * g) without a permutation, which mixes positions with channels; here every
    patch keeps its own, so weights trained there do not carry over.

    between: Kyyle2114/SAM-Adapter-Pytorch-Implementation, with 400,928, 532,640 and 639,648 parameters. Its
    `HFC_tune`, linear on unfolded patches, is the same function as the convolution used here. That code
    starts from PyTorch's default weights, ours like `official`, with a standard deviation of .02.

    Raises UsageError if `scale_factor` leaves no channel.
    """

    def __init__(self, size: ModelSize, knobs: SamAdapterKnobs):
        super().__init__()
        self.knobs = knobs
        self.between = knobs.variant == "between"
        width = knobs.tune_width or (BETWEEN_WIDTH if self.between else size.width // knobs.scale_factor)
        if width < 1:
            raise UsageError(
                f"--sa-scale-factor {knobs.scale_factor}: leaves no channel of the {size.width} of {size.name}; "
                f"use at most {size.width}, or set --sa-tune-width"
            )
        inner = knobs.bottleneck if self.between else width
        self.frequency_tune = nn.Conv2d(3, width, size.patch, size.patch)
        self.embedding_tune = nn.Linear(size.width, width)
        self.place_tunes = nn.ModuleList(nn.Linear(width, inner) for _ in range(size.depth + self.between))
        self.up_projection = nn.Linear(inner, size.width)
        self._start()

    def _start(self) -> None:
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        if not self.between:
            nn.init.kaiming_normal_(self.frequency_tune.weight, mode="fan_out")
        if self.knobs.start == "identity":
            nn.init.zeros_(self.up_projection.weight)

    def prepare(
        self,
        inputs: Float[Tensor, "I 3 S S"],
        patches: Float[Tensor, "I g g C"],
        tokens: Float[Tensor, "I g g C"],
    ) -> Float[Tensor, "I g g T"]:
        """The sum of both projections, which all places share."""
        high = high_frequencies(inputs, self.knobs.mask_ratio).to(inputs.dtype)
        from_frequencies = self.frequency_tune(high).permute(0, 2, 3, 1)
        return from_frequencies + self.embedding_tune(tokens if self.between else patches)

    def before_block(
        self, number: int, tokens: Float[Tensor, "I g g C"], prior: Float[Tensor, "I g g T"]
    ) -> Float[Tensor, "I g g C"]:
        if self.between and number > 0:
            return tokens
        return tokens + self._added(number, prior)

    def after_block(
        self, number: int, tokens: Float[Tensor, "I g g C"], prior: Float[Tensor, "I g g T"]
    ) -> Float[Tensor, "I g g C"]:
        return tokens + self._added(number + 1, prior) if self.between else tokens

    def _added(self, place: int, prior: Float[Tensor, "I g g T"]) -> Float[Tensor, "I g g C"]:
        return self.up_projection(F.gelu(self.place_tunes[place](prior)))


def high_frequencies(inputs: Float[Tensor, "I 3 S S"], mask_ratio: float) -> Float[Tensor, "I 3 S S"]:
    """What is left of the normalised pixels without their low frequencies, as absolute values in fp32.

    A square with sides of about S sqrt(`mask_ratio`), centred on frequency zero, is removed (Liu et al.
    2023, Explicit Visual Prompting, and the `fft` of tianrun-chen/SAM-Adapter-PyTorch).
    """
    side = inputs.shape[-1]
    half = int((side * side * mask_ratio) ** 0.5 // 2)
    removed = slice(side // 2 - half, side // 2 + half)
    kept = torch.ones(side, side, device=inputs.device)
    kept[removed, removed] = 0
    # Half precision lacks most transforms, and its rounding is as large as many high frequencies.
    spectrum = torch.fft.fft2(inputs.float(), norm="forward")
    # Moving the zeros to the corners, where frequency zero is, saves moving the whole spectrum twice.
    spectrum = spectrum * torch.fft.ifftshift(kept)
    # The square reaches one frequency further below zero than above, so the inverse is not quite real.
    return torch.fft.ifft2(spectrum, norm="forward").real.abs()
