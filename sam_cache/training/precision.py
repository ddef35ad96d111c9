"""Accelerate, set up the way this project uses it: device, autocast, loss scaling, trackers."""

from pathlib import Path

import torch
from accelerate import Accelerator

AUTOCAST = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def make_accelerator(device: torch.device, precision: str, folder: Path) -> Accelerator:
    """An Accelerator on `device` that computes in `precision` and logs to `folder`/tensorboard.

    Accelerate keeps one device for the whole process: asking later for another one has no effect.
    """
    accelerator = Accelerator(
        mixed_precision=AUTOCAST[precision],
        cpu=device.type == "cpu",
        log_with="tensorboard",
        project_dir=folder,
    )
    accelerator.init_trackers("tensorboard")
    return accelerator
