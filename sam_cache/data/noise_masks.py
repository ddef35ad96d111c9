"""Mask prompts made from the object itself, its outline blurred by noise, as HQ-SAM trains with them."""

import numpy as np
import torch
from numpy.random import Generator
from torch.nn.functional import interpolate

FACTOR = 8  # as coarse as this, a mask loses what is redrawn by chance
TOLERANCE = 0.01  # a cell whose coverage changes less than that keeps its side
LOGIT = 10.0


def degrade_mask(coverage: np.ndarray, random: Generator) -> np.ndarray | None:
    """A mask prompt: logits (h, w), float32, of a mask that is right but for its outline; None where it is empty.

    `coverage` (h, w), float32 in [0, 1], is how much of each of the decoder's cells the object covers.
    Cells that differ by 0.01 or more from the mask made 8 times smaller and large again, both bilinearly,
    get standard normal noise added; the degraded mask is where 0.5 is exceeded. This is `masks_noise` of
    HQ-SAM (Ke et al. 2023; SysCV/sam-hq, train/utils/misc.py), at the resolution where its training calls it.

    HQ-SAM feeds that mask as 0 and 255. What SAM takes as mask prompts are logits, so it is 10 inside
    and -10 outside here: `mask * 20 - 10` of SAM 2 (facebookresearch/sam2, `_use_mask_as_output` in
    sam2/modeling/sam2_base.py, "sigmoid(-10.0)=4.5398e-05").
    """
    mask = torch.from_numpy(coverage)[None, None]
    smaller = [max(1, side // FACTOR) for side in coverage.shape]
    coarse = interpolate(interpolate(mask, smaller, mode="bilinear"), coverage.shape, mode="bilinear")
    unsure = (mask - coarse).abs()[0, 0].numpy() >= TOLERANCE
    degraded = coverage + random.standard_normal(coverage.shape, np.float32) * unsure > 0.5
    if not degraded.any():
        return None
    return np.where(degraded, np.float32(LOGIT), np.float32(-LOGIT))
