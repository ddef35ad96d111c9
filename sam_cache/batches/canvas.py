"""The targets of batches, drawn in memory that is used again and again."""

from collections.abc import Sequence
from math import prod

import numpy as np
import torch

from sam_cache.data import Geometry, Patch, valid_coverage
from sam_cache.types import Targets

PINNED_BYTES = 2**28  # page-locked memory is lost to all others: a crowd of objects travels without


class Canvas:
    """Room for the targets of one batch at a time: those drawn last are valid until the next are drawn.

    Touching fresh memory costs more than all drawing. Masks are 0 but for the boxes of their objects, so
    those boxes alone are wiped, and what no mask has ever reached is never touched. `resolution` is the side of a
    mask; `pin` makes the memory page-locked, up to 256 MiB of masks.
    """

    def __init__(self, resolution: int, pin: bool = False):
        self._resolution, self._pin = resolution, pin
        self._masks, self._valid = self._room(0), self._room(0)
        self._drawn: list[tuple[int, slice, slice]] = []

    def draw(self, patches: Sequence[Patch], geometries: Sequence[Geometry], weights: np.ndarray) -> Targets:
        """Targets of P prompts with these masks and `weights` (P,), float32, in images of these geometries."""
        if len(patches) > len(self._masks):
            self._masks, self._drawn = self._room(len(patches)), []
        if len(geometries) > len(self._valid):
            self._valid = self._room(len(geometries))
        masks, valid = self._masks.numpy(), self._valid.numpy()
        for place in self._drawn:
            masks[place] = 0
        self._drawn = [(prompt, *patch.box) for prompt, patch in enumerate(patches)]
        for place, patch in zip(self._drawn, patches, strict=True):
            masks[place] = patch.cells
        for image, geometry in enumerate(geometries):
            valid_coverage(geometry, self._resolution, out=valid[image])
        return Targets(self._masks[: len(patches)], self._valid[: len(geometries)], torch.from_numpy(weights))

    def _room(self, count: int) -> torch.Tensor:
        """Zeros (N, h, w) for `count` and some more, so that room is seldom made anew; unused pages cost nothing."""
        shape = count + count // 4, self._resolution, self._resolution
        if self._pin and 4 * prod(shape) <= PINNED_BYTES:
            return torch.zeros(shape, pin_memory=True)
        return torch.from_numpy(np.zeros(shape, np.float32))
