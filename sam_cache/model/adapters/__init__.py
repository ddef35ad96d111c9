"""Adapters: what can be trained inside a frozen image encoder, instead of the encoder itself."""

import torch
from torch import nn

from sam_cache.errors import UsageError
from sam_cache.model.adapters.adapter import Adapter
from sam_cache.model.adapters.lora import LoraKnobs, LowRankLinear, insert_low_rank, merge_low_rank
from sam_cache.model.adapters.sam_adapter import SamAdapter, SamAdapterKnobs
from sam_cache.model.adapters.spatial_prior import SpatialPrior, SpatialPriorKnobs

AdapterKnobs = SamAdapterKnobs | LoraKnobs | SpatialPriorKnobs

__all__ = [
    "Adapter",
    "AdapterKnobs",
    "LoraKnobs",
    "LowRankLinear",
    "SamAdapter",
    "SamAdapterKnobs",
    "SpatialPrior",
    "SpatialPriorKnobs",
    "adapter_parameters",
    "attach",
    "merge",
]


def attach(encoder: nn.Module, knobs: AdapterKnobs, seed: int) -> None:
    """Give an `Encoder` a new adapter whose weights are drawn from `seed`; everything else is left as it is.

    Move and cast the encoder afterwards: an adapter is made in fp32 on the CPU. Raises UsageError for
    knobs that do not fit the encoder.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        match knobs:
            case SamAdapterKnobs():
                encoder.adapter = SamAdapter(encoder.size, knobs)
            case LoraKnobs():
                insert_low_rank(encoder.vit, knobs)
            case SpatialPriorKnobs():
                encoder.adapter = SpatialPrior(encoder.size, knobs)


def adapter_parameters(encoder: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that `attach` has added, by their name within the encoder."""
    return {
        name: parameter
        for name, parameter in encoder.named_parameters()
        if name.startswith("adapter.") or ".low_rank_" in name
    }


def merge(encoder: nn.Module) -> None:
    """Fold the adapter into the encoder's own weights, so that upstream's code computes the same.

    Raises UsageError for an adapter that depends on the image, which no fixed weight can replace.
    """
    if encoder.adapter is not None:
        raise UsageError(
            f"{type(encoder.adapter).__name__}: depends on the image and cannot become plain weights; "
            "use it through samcache, or train with --adapter lora to export"
        )
    merge_low_rank(encoder.vit)
