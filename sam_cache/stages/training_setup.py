"""What a training stage sets up before its loop: network, pace, optimizer, evaluation, record."""

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from sam_cache.config import TrainTopConfig
from sam_cache.data import PromptMixture
from sam_cache.errors import UsageError
from sam_cache.model import PARTS, Top, freeze, load_top, top_from_bytes, top_to_bytes
from sam_cache.stages.cached_data import CachedData
from sam_cache.stages.scoring import mean_scores
from sam_cache.training import Pace, RunFolder, learning_rate_factor

START = "start.safetensors"  # in a run folder: the whole top that training started from, where it is not the store's


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


def make_optimizer(cfg: TrainTopConfig, top: Top, steps: int) -> tuple[torch.optim.Optimizer, Callable[[int], float]]:
    """AdamW over what is trained, and its learning rate at any step."""
    trained = [parameter for parameter in top.parameters() if parameter.requires_grad]

    def learning_rate_at(step: int) -> float:
        return cfg.learning_rate * learning_rate_factor(
            step, steps, cfg.warmup, cfg.schedule, cfg.milestones, cfg.gamma
        )

    return torch.optim.AdamW(trained, lr=cfg.learning_rate, weight_decay=cfg.weight_decay), learning_rate_at


def make_evaluation(
    cfg: TrainTopConfig, data: CachedData, top: Top, mixture: PromptMixture, mask_budget: int, device: torch.device
) -> partial:
    """Scores `top` on held-out rows, or on those of --eval-store, always the same ones."""
    rows = data.held_out
    if cfg.eval_store:
        home = data.store
        data = CachedData.open(cfg.eval_store, annotations=None, partial=cfg.partial, held_out=0, seed=cfg.seed)
        data.check_encoder(home.spec.to_json(), str(cfg.store))
        rows = data.train
    return partial(mean_scores, top, data, rows[: cfg.evaluate_images], mixture, cfg.seed, mask_budget, device)


# What may change when a run goes on; everything else would make it another run.
FREE = {"resume", "out", "steps", "epochs", "device", "threads", "mask_budget", "save_every", "partial"}
FREE |= {"evaluate_every", "evaluate_images", "eval_store"}


def start_run(cfg: TrainTopConfig, record: dict, top: Top) -> RunFolder:
    run = RunFolder.create(cfg.out or Path(f"runs/train-top-{time.strftime('%Y%m%d-%H%M%S')}"))
    if cfg.checkpoint:  # else the store's base weights are where it starts
        (run.path / START).write_bytes(top_to_bytes(top))
    run.write_json("record.json", record)
    run.write_json("config.json", cfg.model_dump(mode="json", by_alias=True))
    return run


def continue_run(cfg: TrainTopConfig, record: dict) -> RunFolder:
    """The run in --out, if it is still the same. Raises UsageError naming what differs."""
    if cfg.out is None:
        raise UsageError("--resume: say which run with --out")
    run = RunFolder.open(cfg.out)
    before, now = run.read_json("config.json"), cfg.model_dump(mode="json", by_alias=True)
    differing = [f"{name} was {before.get(name)!r}, is {now[name]!r}" for name in now
                 if name not in FREE and before.get(name) != now[name]]  # fmt: skip
    old = run.read_json("record.json")
    differing += [f"{name} of the store changed" for name in ("identity", "trained", "held_out")
                  if old[name] != record[name]]  # fmt: skip
    if differing:
        raise UsageError(f"--resume: {cfg.out} is another run: {'; '.join(differing)}; choose another --out")
    run.write_json("config.json", now)
    return run


def describe(data: CachedData, rows: np.ndarray, top: Top, precision: str) -> dict:
    """What the run is given; `eval` takes its held-out images from here."""
    return {
        "store": str(data.store.path.resolve()),
        "identity": data.store.spec.to_json(),
        "model": top.size.name,
        "precision": precision,
        "trained": data.names(rows),
        "held_out": data.names(data.held_out),
    }
