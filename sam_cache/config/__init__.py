"""Every knob, once: one strict model per stage, one field per knob.

A field is a `--kebab-flag`, a TOML key of a recipe and a line of the resolved configuration that
goes into run folders and stores. Precedence: defaults < recipe `[shared]` < recipe `[stage]` < flags.
"""

from sam_cache.config.base import StageConfig, home, resolve, with_absolute_paths
from sam_cache.config.knobs import (
    AdapterKnobs,
    DatasetKnobs,
    DeviceKnobs,
    ModelKnobs,
    ObjectKnobs,
    PixelKnobs,
    RunKnobs,
    SplitKnobs,
    TrainingKnobs,
)
from sam_cache.config.stages import (
    CalibrateConfig,
    EmbedConfig,
    EvalConfig,
    ExportConfig,
    InfoConfig,
    PredictConfig,
    TrainFullConfig,
    TrainTopConfig,
    VerifyConfig,
)

__all__ = [
    "AdapterKnobs",
    "CalibrateConfig",
    "DatasetKnobs",
    "DeviceKnobs",
    "EmbedConfig",
    "EvalConfig",
    "ExportConfig",
    "InfoConfig",
    "ModelKnobs",
    "ObjectKnobs",
    "PixelKnobs",
    "PredictConfig",
    "RunKnobs",
    "SplitKnobs",
    "StageConfig",
    "TrainFullConfig",
    "TrainTopConfig",
    "TrainingKnobs",
    "VerifyConfig",
    "home",
    "resolve",
    "with_absolute_paths",
]
