"""SAM itself: checkpoints, the image encoder, and the batched prompt encoder and mask decoder."""

from sam_cache.model.adapters import (
    AdapterKnobs,
    LoraKnobs,
    SamAdapterKnobs,
    SpatialPriorKnobs,
    adapter_parameters,
    attach,
    merge,
)
from sam_cache.model.checkpoints import state_digest
from sam_cache.model.decoder import Masks
from sam_cache.model.encoder import Encoder, load_encoder
from sam_cache.model.export import (
    Agreement,
    check_suffix,
    compare_with_upstream,
    fit_trained,
    import_upstream,
    official_state,
    write_state,
)
from sam_cache.model.frames import masks_to_image
from sam_cache.model.hq import HqOutput
from sam_cache.model.memory import estimate_memory
from sam_cache.model.sam import Sam, depth_of, load_sam
from sam_cache.model.sizes import SIZES, ModelSize, size_of
from sam_cache.model.top import (
    PARTS,
    Top,
    add_head,
    freeze,
    levels_of,
    load_top,
    parts_of,
    top_from_bytes,
    top_to_bytes,
)
from sam_cache.model.weights import fixed_weights

__all__ = [
    "PARTS",
    "SIZES",
    "AdapterKnobs",
    "Agreement",
    "Encoder",
    "HqOutput",
    "LoraKnobs",
    "Masks",
    "ModelSize",
    "Sam",
    "SamAdapterKnobs",
    "SpatialPriorKnobs",
    "Top",
    "adapter_parameters",
    "add_head",
    "attach",
    "check_suffix",
    "compare_with_upstream",
    "depth_of",
    "estimate_memory",
    "fit_trained",
    "fixed_weights",
    "freeze",
    "import_upstream",
    "levels_of",
    "load_encoder",
    "load_sam",
    "load_top",
    "masks_to_image",
    "merge",
    "official_state",
    "parts_of",
    "size_of",
    "state_digest",
    "top_from_bytes",
    "top_to_bytes",
    "write_state",
]
