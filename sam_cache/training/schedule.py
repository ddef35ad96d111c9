"""The learning rate as a pure function of the step, so that a resumed run needs no state for it."""

from bisect import bisect_right
from collections.abc import Sequence
from math import cos, pi

from sam_cache.errors import UsageError


def learning_rate_factor(
    step: int,
    total: int,
    warmup: int = 0,
    kind: str = "cosine",
    milestones: Sequence[int] = (),
    gamma: float = 0.1,
) -> float:
    """What the base learning rate is multiplied by at optimizer step `step`, counted from 0.

    It rises linearly over the first `warmup` steps (1 / warmup, 2 / warmup, ..., 1) and then
    follows `kind`:

        cosine    half a cosine from 1 down to 0 at step `total`, and 0 from there on
        step      multiplied by `gamma` at each of the ascending `milestones`, which count from
                  step 0 (SAM: warm-up 250, milestones 60,000 and 86,666 of 90,000)
        constant  1

    Raises UsageError for another kind.
    """
    if step < warmup:
        return (step + 1) / warmup
    match kind:
        case "cosine":
            progress = min((step - warmup) / max(total - warmup, 1), 1.0)
            return (1 + cos(pi * progress)) / 2
        case "step":
            return gamma ** bisect_right(milestones, step)
        case "constant":
            return 1.0
    raise UsageError(f"learning-rate schedule {kind!r} is unknown: use cosine, step or constant")
