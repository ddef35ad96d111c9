"""What a training stage sets up before its loop: network, pace, optimizer, evaluation, record."""

import math
from functools import partial

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR

from sam_cache.config import TrainTopConfig
from sam_cache.data import PromptMixture
from sam_cache.errors import StoreError, UsageError
from sam_cache.model import PARTS, Top, freeze, load_top, top_from_bytes
from sam_cache.stages.cached_data import CachedData
from sam_cache.stages.scoring import mean_scores
from sam_cache.training import Pace, learning_rate_factor


def open_top(cfg: TrainTopConfig, data: CachedData) -> Top:
    """The store's base weights, or those of --checkpoint, with only the parts of --train free to move."""
    top = top_from_bytes(data.store.base)
    if cfg.checkpoint:
        top = load_top(top.size.name, cfg.checkpoint, top.size.input_size)
    parts = {part.strip() for part in cfg.train.split(",")}
    if unknown := parts - set(PARTS):
        raise UsageError(f"--train {cfg.train}: unknown part {min(unknown)!r}; parts are {', '.join(PARTS)}")
    freeze(top, parts)
    return top


def set_pace(cfg: TrainTopConfig, rows: int, mask_budget: int) -> Pace:
    if cfg.steps and cfg.epochs:
        raise UsageError(f"--steps {cfg.steps} and --epochs {cfg.epochs}: give one of them")
    steps = cfg.steps or math.ceil((cfg.epochs or 10) * math.ceil(rows / cfg.batch_size) / cfg.accumulation)
    every = cfg.evaluate_every or max(1, steps // 10)
    return Pace(steps, every, cfg.save_every or every, cfg.accumulation, mask_budget, cfg.clip)


def make_optimizer(cfg: TrainTopConfig, top: Top, steps: int) -> tuple[torch.optim.AdamW, LambdaLR]:
    trained = [parameter for parameter in top.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=cfg.learning_rate, weight_decay=cfg.weight_decay)
    factor = partial(
        learning_rate_factor,
        total=steps,
        warmup=cfg.warmup,
        kind=cfg.schedule,
        milestones=cfg.milestones,
        gamma=cfg.gamma,
    )
    return optimizer, LambdaLR(optimizer, factor)


def make_evaluation(
    cfg: TrainTopConfig, data: CachedData, top: Top, mixture: PromptMixture, mask_budget: int, device: torch.device
) -> partial:
    """Scores `top` on held-out rows, or on rows of --eval-store, always the same ones."""
    if cfg.eval_store:
        other = CachedData.open(cfg.eval_store, annotations=None, partial=cfg.partial, held_out=0, seed=cfg.seed)
        if other.store.spec.encoder_sha256 != data.store.spec.encoder_sha256:
            raise StoreError(f"--eval-store {cfg.eval_store}: was made by another encoder than {cfg.store}")
        data = other.holding_out([int(row) for row in other.rows])
    rows = data.held_out[: cfg.evaluate_images]
    return partial(mean_scores, top, data, rows, mixture, cfg.seed, mask_budget, device)


def describe(cfg: TrainTopConfig, data: CachedData, rows: np.ndarray, top: Top, precision: str) -> dict:
    """What the run was given; `eval` takes its held-out rows from here."""
    return {
        "store": str(cfg.store.resolve()),
        "encoder_sha256": data.store.spec.encoder_sha256,
        "model": top.size.name,
        "precision": precision,
        "rows": rows.tolist(),
        "held_out": data.held_out.tolist(),
    }
