"""Accelerate, set up the way this project uses it: device, autocast, loss scaling, trackers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from sam_cache.training.trackers import PROJECT, make_trackers

AUTOCAST = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def make_accelerator(
    device: torch.device,
    precision: str,
    folder: Path,
    trackers: Sequence[str] = ("tensorboard",),
    name: str = "",
    config: dict[str, Any] | None = None,
) -> Accelerator:
    """An Accelerator on `device` that computes in `precision` and logs to `folder`/tensorboard.

    With `wandb` among `trackers` it logs to Weights & Biases too, under `name` or else the folder's
    own; W&B keeps its files in `folder`/wandb and obeys its own variables, WANDB_MODE=offline above
    all. Both are shown `config`. Only the main process opens trackers; `end_training` closes them.
    Accelerate keeps one device for the whole process: asking later for another one has no effect.

    Raises UsageError for an unknown tracker, and for a W&B that is not installed or not logged in.
    """
    # Accelerate remembers the precision of a process's first run, and refuses another one to the next.
    AcceleratorState._reset_state()
    opened = make_trackers(trackers, folder, name or folder.name)
    accelerator = Accelerator(
        mixed_precision=AUTOCAST[precision],
        cpu=device.type == "cpu",
        log_with=opened or None,
        project_dir=folder,
    )
    if accelerator.is_main_process:
        accelerator.init_trackers(PROJECT, config)
    return accelerator
