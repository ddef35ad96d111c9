"""Low-rank updates of the encoder's linear layers, which can be folded back into plain weights."""

from dataclasses import dataclass
from difflib import get_close_matches
from math import inf, sqrt

import torch
import torch.nn.functional as F
from jaxtyping import Float
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn

from sam_cache.errors import UsageError

# A fixed order, so that a seed draws the same numbers however the targets were listed.
TARGETS = ("q", "k", "v", "proj", "mlp")


@dataclass(frozen=True)
class LoraKnobs:
    """What to train, and how much of it.

    The update of a weight is `alpha / rank` times a product of two matrices that share `rank`
    (Hu et al. 2021, LoRA, section 4.1). `targets` are out of q, k, v, proj and mlp; the default is
    that paper's choice. Blocks before `first_block`, counted from 0, stay as they are.
    """

    rank: int = 4
    alpha: float = 4.0
    targets: tuple[str, ...] = ("q", "v")
    first_block: int = 0


class LowRankLinear(nn.Linear):
    """A linear layer on the tensors of `base`, plus low-rank updates of ranges of its outputs.

    `parts` maps a target to the outputs it updates. For each there are two parameters:
    `low_rank_down_<target>` (rank, inputs), drawn as `nn.Linear` draws its weight, and
    `low_rank_up_<target>` (outputs of the part, rank), zero, so that nothing changes at first.
    `weight` and `bias` are the very parameters of `base`, under the names they had.
    """

    def __init__(self, base: nn.Linear, parts: dict[str, range], rank: int, scale: float):
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.parts, self.scale = parts, scale
        self.train(base.training)
        for target, part in parts.items():
            down = torch.empty(rank, base.in_features)
            # Drawn on the CPU whatever the device, so that one seed means one adapter.
            nn.init.kaiming_uniform_(down, a=sqrt(5))
            self.register_parameter(f"low_rank_down_{target}", nn.Parameter(down.to(base.weight)))
            self.register_parameter(f"low_rank_up_{target}", nn.Parameter(base.weight.new_zeros(len(part), rank)))

    def forward(self, tokens: Float[Tensor, "... C"]) -> Float[Tensor, "... D"]:
        down, up = self._factors()
        return F.linear(tokens, self.weight, self.bias) + F.linear(F.linear(tokens, down), self.scale * up)

    def _factors(self) -> tuple[Float[Tensor, "R C"], Float[Tensor, "D R"]]:
        """All targets at once: a part's rows are zero in the columns of the other parts.

        That makes two thin products of what would be two for each target.
        """
        downs = [getattr(self, f"low_rank_down_{target}") for target in self.parts]
        ups = [
            F.pad(getattr(self, f"low_rank_up_{target}"), (0, 0, part.start, self.out_features - part.stop))
            for target, part in self.parts.items()
        ]
        return torch.cat(downs), torch.cat(ups, dim=1)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain layer with the updates in its weight, added in fp32."""
        down, up = self._factors()
        weight = self.weight.float() + self.scale * up.float() @ down.float()
        plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        plain.weight = nn.Parameter(weight.to(self.weight.dtype), requires_grad=self.weight.requires_grad)
        plain.bias = self.bias
        return plain.train(self.training)


def insert_low_rank(vit: ImageEncoderViT, knobs: LoraKnobs) -> None:
    """Put a `LowRankLinear` in the place of every layer that `knobs.targets` names.

    q, k and v share one layer, of which each updates its third; `mlp` is both layers of the MLP.
    For a ViT of width C whose MLP is 4 C wide, the parameters added are

        (depth - first_block) * rank * C * (2 * (how many of q, k, v, proj) + 10 * (1 if mlp)).

    Raises UsageError for knobs that do not fit this encoder, and for one that has such layers already.
    """
    _check(vit, knobs)
    for block in vit.blocks[knobs.first_block :]:
        for owner, name, every_part in _places(block):
            parts = {target: every_part[target] for target in TARGETS if target in every_part.keys() & knobs.targets}
            if parts:
                low_rank = LowRankLinear(getattr(owner, name), parts, knobs.rank, knobs.alpha / knobs.rank)
                setattr(owner, name, low_rank)


def merge_low_rank(vit: ImageEncoderViT) -> None:
    """Put a plain `nn.Linear` that computes the same in the place of every `LowRankLinear`, if there are any."""
    for block in vit.blocks:
        for owner, name, _ in _places(block):
            layer = getattr(owner, name)
            if isinstance(layer, LowRankLinear):
                setattr(owner, name, layer.merged())


def _places(block: nn.Module) -> list[tuple[nn.Module, str, dict[str, range]]]:
    """The linear layers of a block: owner, attribute, and the outputs that each target updates."""
    width, hidden = block.attn.proj.out_features, block.mlp.lin1.out_features
    thirds = {target: range(third * width, (third + 1) * width) for third, target in enumerate("qkv")}
    return [
        (block.attn, "qkv", thirds),
        (block.attn, "proj", {"proj": range(width)}),
        (block.mlp, "lin1", {"mlp": range(hidden)}),
        (block.mlp, "lin2", {"mlp": range(width)}),
    ]


def _check(vit: ImageEncoderViT, knobs: LoraKnobs) -> None:
    depth, width = len(vit.blocks), vit.blocks[0].attn.proj.out_features
    if not knobs.targets:
        raise UsageError(f"--lora-targets names no layer: choose from {', '.join(TARGETS)}")
    for target in knobs.targets:
        if target not in TARGETS:
            nearest = get_close_matches(target, TARGETS, n=1, cutoff=0)[0]
            raise UsageError(
                f"--lora-targets {target!r}: unknown target; did you mean {nearest}? Targets: {', '.join(TARGETS)}"
            )
    if not 1 <= knobs.rank <= width:
        raise UsageError(f"--lora-rank {knobs.rank}: this encoder is {width} wide; choose from 1 to {width}")
    if not 0 < knobs.alpha < inf:
        raise UsageError(f"--lora-alpha {knobs.alpha}: choose a number above 0, such as the rank")
    if not 0 <= knobs.first_block < depth:
        raise UsageError(
            f"--lora-from-block {knobs.first_block}: this encoder has {depth} blocks; choose from 0 to {depth - 1}"
        )
    if any(isinstance(module, LowRankLinear) for module in vit.modules()):
        raise UsageError("--adapter lora: this encoder has low-rank layers already; merge those first")
