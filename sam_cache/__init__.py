"""samcache: run SAM's frozen image encoder once, fine-tune the rest from its embeddings.

The public Python API is what `__all__` names; it is imported when first used, so that
`import sam_cache` and the command line stay light.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "sam_cache.config": (
        "CalibrateConfig",
        "EmbedConfig",
        "EvalConfig",
        "ExportConfig",
        "InfoConfig",
        "PredictConfig",
        "TrainFullConfig",
        "TrainTopConfig",
        "VerifyConfig",
    ),
    "sam_cache.data": ("Dataset", "mask_to_rle", "measure_rle", "open_dataset"),
    "sam_cache.errors": ("SamcacheError",),
    "sam_cache.stages.calibrate": ("calibrate",),
    "sam_cache.stages.embed": ("embed",),
    "sam_cache.stages.evaluate": ("evaluate",),
    "sam_cache.stages.export": ("export",),
    "sam_cache.stages.predict": ("predict",),
    "sam_cache.stages.train_full": ("train_full",),
    "sam_cache.stages.train_top": ("train_top",),
    "sam_cache.stages.verify": ("verify_store",),
    "sam_cache.store": ("EmbeddingStore",),
    "sam_cache.types": ("Batch", "ImageRecord", "ObjectRecord", "Prompts", "Targets"),
}

__all__ = sorted(name for names in _HOMES.values() for name in names)


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'sam_cache' has no attribute {name!r}")
