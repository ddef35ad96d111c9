"""A convolutional network beside the encoder whose features join the q, k and v of every block."""

from collections import OrderedDict
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models import ResNet, resnet50
from torchvision.models.resnet import Bottleneck
from torchvision.ops import FeaturePyramidNetwork

from sam_cache.errors import CheckpointError, UsageError
from sam_cache.model.adapters.adapter import Adapter
from sam_cache.model.checkpoints import State, read_tensors
from sam_cache.model.sizes import ModelSize

LEVELS = {"layer1": 256, "layer2": 512, "layer3": 1024, "layer4": 2048}  # channels, He et al. 2015, table 1
RESIDUAL_BRANCHES = 16  # bottlenecks of a ResNet-50, 3 + 4 + 6 + 3
BATCH_NORM_EPS = 1e-5  # torch's default, which torchvision's resnet50 keeps


@dataclass(frozen=True)
class SpatialPriorKnobs:
    """`rank` of the updates of q, k and v, `channels` of the feature pyramid, and the network's start.

    `backbone` is a resnet50 state dict in torchvision's layout, `.pth` or `.safetensors`; None draws one.
    """

    rank: int = 16
    channels: int = 256
    backbone: Path | None = None


class ScaleAndShift(nn.Module):
    """One weight and one bias per channel: what a BatchNorm is once its statistics are fixed.

    Nothing in it depends on the batch, so neither does a mask, and all of it is parameters.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, features: Float[Tensor, "I C H W"]) -> Float[Tensor, "I C H W"]:
        # In the features' own type: under autocast fp32 factors would double every activation kept.
        weight, bias = self.weight.to(features.dtype), self.bias.to(features.dtype)
        return features * weight[:, None, None] + bias[:, None, None]


class LowRankQkv(nn.Module):
    """A low-rank map of tokens for each of q, k and v; zero until trained."""

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.q_lora, self.k_lora, self.v_lora = (_low_rank(width, rank) for _ in range(3))

    def forward(self, tokens: Float[Tensor, "I g g C"]) -> Float[Tensor, "I g g 3*C"]:
        return torch.cat([self.q_lora(tokens), self.k_lora(tokens), self.v_lora(tokens)], dim=-1)


class SpatialPrior(Adapter):
    """ResNet-50 features of the image, added where the encoder attends.

    The four stages of the network go through a feature pyramid (Lin et al. 2017), each level is
    resized to the grid of tokens, and a 1x1 convolution takes their sum to the width of the tokens:
    the spatial prior, in the sense of ViT-Adapter (Chen et al. 2022). In each block, the sum of the
    normed tokens and the prior goes through two thin layers each for q, k and v (LoRA, Hu et al. 2021).

    With grid g, width C and B blocks these are 23 508 032 parameters of the backbone, and for F
    pyramid channels and rank r another F * (3840 + 36 F + 8) + (F + 1) * C + B * 6 * r * C.

    Raises UsageError for knobs that do not fit, CheckpointError for a file that is not a resnet50.
    """

    def __init__(self, size: ModelSize, knobs: SpatialPriorKnobs):
        super().__init__()
        if not 1 <= knobs.rank <= size.width:
            raise UsageError(f"--spm-rank {knobs.rank}: {size.name} is {size.width} wide; choose 1 to {size.width}")
        if knobs.channels < 1:
            raise UsageError(f"--spm-channels {knobs.channels}: a feature pyramid needs at least 1, usually 256")
        self.backbone = _build_backbone(knobs.backbone)
        self.pyramid = FeaturePyramidNetwork(list(LEVELS.values()), knobs.channels)
        self.to_width = nn.Conv2d(knobs.channels, size.width, kernel_size=1)
        self.layers = nn.ModuleList(LowRankQkv(size.width, knobs.rank) for _ in range(size.depth))

    def features(self, inputs: Float[Tensor, "I 3 S S"]) -> dict[str, Float[Tensor, "I _ _ _"]]:
        """The output of each stage of the backbone, at 1/4, 1/8, 1/16 and 1/32 of the input."""
        network = self.backbone
        features = network.maxpool(network.relu(network.bn1(network.conv1(inputs))))
        found = {}
        for name in LEVELS:
            found[name] = features = getattr(network, name)(features)
        return found

    def prepare(
        self,
        inputs: Float[Tensor, "I 3 S S"],
        patches: Float[Tensor, "I g g C"],
        tokens: Float[Tensor, "I g g C"],
    ) -> Float[Tensor, "I g g C"]:
        """The prior, once per batch. A backbone from ImageNet expects pixels normalised as `sam` does."""
        grid = tokens.shape[1]
        levels = self.pyramid(self.features(inputs)).values()
        return self.to_width(sum(_resize(level, grid) for level in levels)).permute(0, 2, 3, 1)

    def added_qkv(
        self, number: int, normed: Float[Tensor, "I g g C"], prior: Float[Tensor, "I g g C"]
    ) -> Float[Tensor, "I g g 3*C"]:
        return self.layers[number](normed + prior)


def _low_rank(width: int, rank: int) -> nn.Sequential:
    down, up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)
    nn.init.zeros_(up.weight)
    return nn.Sequential(OrderedDict(down=down, up=up))


def _resize(level: Float[Tensor, "I F H W"], grid: int) -> Float[Tensor, "I F g g"]:
    """Shrink by averaging all that a token covers, grow by interpolation."""
    if level.shape[-1] > grid:
        return F.adaptive_avg_pool2d(level, grid)
    return F.interpolate(level, (grid, grid), mode="bilinear")


def _build_backbone(path: Path | None) -> ResNet:
    state = None if path is None else _fold_batch_norms(_read_backbone(path))
    network = resnet50(norm_layer=ScaleAndShift)
    del network.fc, network.avgpool
    if state is not None:
        network.load_state_dict(state)
        return network
    # Nothing normalises what is drawn, and each residual branch adds variance. Branches scaled by one
    # over the root of their number keep the growth bounded (SkipInit, De & Smith 2020), and unlike
    # branches scaled by zero they all have gradients from the start.
    for module in network.modules():
        if isinstance(module, Bottleneck):
            nn.init.constant_(module.bn3.weight, 1 / sqrt(RESIDUAL_BRANCHES))
    return network


def _read_backbone(path: Path) -> State:
    """The tensors of torchvision's resnet50, without its classifier and its counters of batches."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; name a resnet50 state dict of torchvision, or none to draw one")
    found = {key: tensor for key, tensor in read_tensors(path).items() if _matters(key)}
    with torch.device("meta"):
        expected = {key: tensor.shape for key, tensor in resnet50().state_dict().items() if _matters(key)}
    for key in (*expected, *found):
        if key not in found:
            misfit = f"{key} is missing"
        elif key not in expected:
            misfit = f"{key} is unexpected"
        elif found[key].shape != expected[key]:
            misfit = f"{key} is {tuple(found[key].shape)} instead of {tuple(expected[key])}"
        else:
            continue
        raise CheckpointError(f"{path}: not a resnet50 of torchvision: {misfit}; save resnet50().state_dict()")
    return found


def _matters(key: str) -> bool:
    return not key.startswith("fc.") and not key.endswith(".num_batches_tracked")


def _fold_batch_norms(state: State) -> State:
    """A BatchNorm in evaluation, (x - mean) / sqrt(var + eps) * w + b, as one weight and one bias."""
    folded = {key: tensor.float() for key, tensor in state.items() if ".running_" not in key}
    for key in state:
        if key.endswith(".running_var"):
            layer = key.removesuffix(".running_var")
            scale = folded[f"{layer}.weight"] / (state[key].float() + BATCH_NORM_EPS).sqrt()
            folded[f"{layer}.weight"] = scale
            folded[f"{layer}.bias"] = folded[f"{layer}.bias"] - state[f"{layer}.running_mean"].float() * scale
    return folded
