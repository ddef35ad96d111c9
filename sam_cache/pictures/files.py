"""Writing pictures so that a reader sees the old file or the new one, never half of one."""

import os
from pathlib import Path

import cv2
import numpy as np


def save_png(path: str | Path, image: np.ndarray) -> None:
    """Write an RGB uint8 (H, W, 3) image as PNG."""
    _, encoded = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    replace_file(path, encoded.tobytes())


def replace_file(path: str | Path, content: bytes) -> None:
    """Put `content` at `path` in one step, making its folder where it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
