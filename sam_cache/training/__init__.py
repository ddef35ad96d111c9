"""The one training loop, its losses, its learning rate, its folder and checkpoints."""

from sam_cache.training.checkpoint import Progress, load, load_trained, trained_parameters
from sam_cache.training.fit import Pace, fit
from sam_cache.training.losses import LossWeights, SamLosses, sam_loss
from sam_cache.training.precision import make_accelerator
from sam_cache.training.run_folder import RunFolder
from sam_cache.training.schedule import learning_rate_factor

__all__ = [
    "LossWeights",
    "Pace",
    "Progress",
    "RunFolder",
    "SamLosses",
    "fit",
    "learning_rate_factor",
    "load",
    "load_trained",
    "make_accelerator",
    "sam_loss",
    "trained_parameters",
]
