"""How far a training goes, how fast, and how often each image comes up."""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from sam_cache.config import TrainingKnobs
from sam_cache.errors import UsageError
from sam_cache.model import depth_of
from sam_cache.training import Pace, learning_rate_factor


def set_pace(cfg: TrainingKnobs, visits: int, mask_budget: int) -> Pace:
    """`visits` are those of an epoch."""
    if cfg.steps and cfg.epochs:
        raise UsageError(f"--steps {cfg.steps} and --epochs {cfg.epochs}: give one of them")
    steps = cfg.steps or math.ceil((cfg.epochs or 10) * math.ceil(visits / cfg.batch_size) / cfg.accumulation)
    every = cfg.evaluate_every or max(1, steps // 10)
    return Pace(
        steps, every, cfg.save_every or every, cfg.accumulation, mask_budget, cfg.clip, cfg.best_by, cfg.patience
    )


def make_optimizer(
    cfg: TrainingKnobs, network: nn.Module, steps: int, layer_decay: float = 1.0
) -> tuple[torch.optim.Optimizer, Callable[[int], float]]:
    """AdamW over what is trained, and its learning rate at any step.

    Parameters `depth` layers before the masks have a group of their own, whose `scale` is
    `layer_decay` to the power of it.
    """
    by_depth: dict[int, list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            by_depth.setdefault(0 if layer_decay == 1 else depth_of(name, network), []).append(parameter)
    if not by_depth:
        raise UsageError("--train: no parameter of these parts is left to train; name others")
    groups = [{"params": found, "scale": layer_decay**depth} for depth, found in sorted(by_depth.items())]

    def learning_rate_at(step: int) -> float:
        factor = learning_rate_factor(step, steps, cfg.warmup, cfg.schedule, cfg.milestones, cfg.gamma)
        if cfg.schedule == "cosine" and step >= cfg.warmup:
            return cfg.least_rate + (cfg.learning_rate - cfg.least_rate) * factor
        return cfg.learning_rate * factor

    # Fused: one pass over each parameter and its moments, where the plain one takes a dozen.
    optimizer = torch.optim.AdamW(groups, lr=cfg.learning_rate, weight_decay=cfg.weight_decay, fused=True)
    return optimizer, learning_rate_at


def choose_repeats(cfg: TrainingKnobs, categories: list[np.ndarray], names: Sequence[str] | None = None) -> np.ndarray:
    """How often each row comes up in an epoch; `categories` are those of its objects.

    By object: often enough for `--max-objects` at a time to reach all. By repeat factor (Gupta et al.
    2019, LVIS, section 4.1): max over its categories c of max(1, sqrt(t / f_c)), f_c being the share of
    images that hold c, in whichever row: rows of one name show one image. Without `names` each is its own.
    """
    if cfg.sampling == "object":
        return np.array([math.ceil(len(found) / cfg.max_objects) for found in categories], np.float64)
    present = [set(found.tolist()) for found in categories]
    of_image: dict[str | int, set[int]] = {}
    for name, found in zip(range(len(present)) if names is None else names, present, strict=True):
        of_image.setdefault(name, set()).update(found)
    images = Counter(category for found in of_image.values() for category in found)
    factor = {
        category: max(1.0, math.sqrt(cfg.repeat_threshold / (count / len(of_image))))
        for category, count in images.items()
    }
    return np.array([max((factor[category] for category in found), default=0.0) for found in present])
