"""Where a run is watched: TensorBoard beside its metrics, and Weights & Biases for those who have it."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from PIL import Image
from torch.utils.tensorboard.summary import hparams

from sam_cache.errors import UsageError

TRACKERS = ("tensorboard", "wandb")
PROJECT = "samcache"  # W&B's, unless WANDB_PROJECT names another


class TensorBoard(TensorBoardTracker):
    """Accelerate's, with the configuration among the run's own events and not in a folder beside them."""

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        """Show `values` under HPARAMS, which knows numbers and text: all else is shown as text."""
        shown = {name: value if isinstance(value, bool | int | float) else str(value) for name, value in values.items()}
        for summary in hparams(shown, {}):
            self.writer.file_writer.add_summary(summary)
        self.writer.flush()


class WeightsAndBiases(WandBTracker):
    """Accelerate's, with an error that says what to do, and nothing that outlives the run."""

    def start(self) -> None:
        import wandb

        try:
            super().start()
        except wandb.Error as error:
            wandb.teardown()
            raise UsageError(f"--trackers wandb: {error} Or keep the run here with WANDB_MODE=offline") from error

    def finish(self) -> None:
        """Upload or write what is left, and end the service process that W&B keeps for a next run."""
        import wandb

        super().finish()
        wandb.teardown()


def check_trackers(names: Sequence[str]) -> None:
    """Raises UsageError for an unknown tracker, and for `wandb` where its package is not installed."""
    if unknown := set(names) - set(TRACKERS):
        raise UsageError(f"--trackers {min(unknown)}: unknown tracker; use {', '.join(TRACKERS)} or both")
    if "wandb" in names:
        try:
            from wandb import init  # noqa: F401  (a mere `import wandb` finds any folder of that name)
        except ImportError as error:
            raise UsageError("--trackers wandb: not installed; run pip install 'samcache[wandb]'") from error


def make_trackers(names: Sequence[str], folder: Path, name: str) -> list[GeneralTracker]:
    """Trackers that write below `folder` once they are started; `name` is what W&B calls the run.

    Raises UsageError for an unknown tracker, and for `wandb` where its package is not installed.
    """
    check_trackers(names)
    trackers: list[GeneralTracker] = []
    if "wandb" in names:  # first, because it alone can fail to start
        trackers.append(WeightsAndBiases(os.environ.get("WANDB_PROJECT", PROJECT), dir=str(folder), name=name))
    if "tensorboard" in names:
        trackers.append(TensorBoard("tensorboard", folder))
    return trackers


def log_images(accelerator: Accelerator, step: int, images: dict[str, np.ndarray]) -> None:
    """Show pictures (H, W, 3), uint8 RGB, by name in every tracker; nothing happens off the main process.

    `step` must not lie before that of what was logged last: W&B drops what comes late.
    """
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":  # which squeezes arrays, and in older versions scaled dark ones up
            tracker.log_images({name: [Image.fromarray(image)] for name, image in images.items()}, step=step)
        else:
            pictures = {name: image[None] for name, image in images.items()}
            tracker.log_images(pictures, step=step, dataformats="NHWC")
