"""The one training loop, its losses, its learning rate, its folder and checkpoints."""

from sam_cache.training.checkpoint import Progress, load, load_trained, trained_parameters
from sam_cache.training.fit import Batches, Pace, fit
from sam_cache.training.losses import LOSSES, POINTS, LossWeights, SamLosses, loss_cells, part_names, sam_loss
from sam_cache.training.precision import make_accelerator
from sam_cache.training.ranks import agree, gather, join_ranks, same_parameters
from sam_cache.training.run_folder import RunFolder
from sam_cache.training.schedule import learning_rate_factor
from sam_cache.training.trackers import check_trackers, log_images

__all__ = [
    "LOSSES",
    "POINTS",
    "Batches",
    "LossWeights",
    "Pace",
    "Progress",
    "RunFolder",
    "SamLosses",
    "agree",
    "check_trackers",
    "fit",
    "gather",
    "join_ranks",
    "learning_rate_factor",
    "load",
    "load_trained",
    "log_images",
    "loss_cells",
    "make_accelerator",
    "part_names",
    "sam_loss",
    "same_parameters",
    "trained_parameters",
]
