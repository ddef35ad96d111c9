"""Stage 2: train prompt encoder and mask decoder from a store alone."""

import math
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from sam_cache.batches import CachedBatches, Cursor, Sampling
from sam_cache.config import TrainTopConfig
from sam_cache.data import PromptMixture, parse_prompts
from sam_cache.errors import Interrupted, StoreError, UsageError
from sam_cache.model import PARTS, Top, freeze, load_top, top_from_bytes
from sam_cache.pictures import draw_curves
from sam_cache.ranks import Ranks
from sam_cache.stages.cached_data import CachedData
from sam_cache.stages.decoding import SamObjective
from sam_cache.stages.device import pick_device, pick_precision
from sam_cache.stages.progress import Bar, say, stop_on_signals
from sam_cache.stages.scoring import mean_scores
from sam_cache.training import (
    LossWeights,
    Pace,
    Progress,
    RunFolder,
    fit,
    learning_rate_factor,
    load,
    make_accelerator,
)


def train_top(cfg: TrainTopConfig) -> int:
    """Train from `--store`; returns 0, or raises Interrupted once a checkpoint holds where it stopped."""
    ranks = Ranks.from_env()
    if ranks.world > 1:
        raise UsageError(
            f"WORLD_SIZE={ranks.world}: train-top runs in one process; start it without torchrun"
        )
    device = pick_device(cfg.device, ranks)
    precision = pick_precision(cfg.precision, device, "--precision")
    mixture = parse_prompts(cfg.prompts)
    data = CachedData.open(
        cfg.store, annotations=cfg.annotations, partial=cfg.partial, held_out=cfg.held_out, seed=cfg.seed
    )
    top = open_top(cfg, data).to(device)
    sampling = Sampling(mixture, cfg.seed, True, cfg.max_objects, cfg.scale_sampled)
    annotator = data.annotator(top.size.mask_size, sampling)
    rows = np.array([row for row in data.train if row in annotator], dtype=np.int64)
    if not len(rows):
        raise StoreError(
            f"{cfg.store}: no row with an object is left to train on; lower --held-out or embed more"
        )

    pace = set_pace(cfg, len(rows))
    run = RunFolder(cfg.out or Path(f"runs/train-top-{time.strftime('%Y%m%d-%H%M%S')}"), resume=cfg.resume)
    accelerator = make_accelerator(device, precision, run.path)
    optimizer, schedule = make_optimizer(cfg, top, pace.steps)
    top, optimizer = accelerator.prepare(top, optimizer)
    progress, cursor = Progress(), Cursor()
    if cfg.resume and run.resumable:
        progress, place = load(top, optimizer, schedule, run)
        run.forget_metrics_after(progress.step)
        cursor = Cursor(**place)
        say(f"{run.path}: going on from step {progress.step}")
    run.write_json("config.json", cfg.model_dump(mode="json", by_alias=True))
    run.write_json("record.json", describe(cfg, data, rows, top, precision))
    count = sum(parameter.numel() for parameter in top.parameters() if parameter.requires_grad)
    say(
        f"{len(rows)} images to train on, {len(data.held_out)} held out; {count:,} parameters, {pace.steps} steps"
    )

    batches = CachedBatches(
        data.store,
        annotator,
        rows,
        batch_size=cfg.batch_size,
        seed=cfg.seed,
        threads=cfg.threads,
        keep=cfg.accumulation,
        pin=device.type == "cuda",
        cursor=cursor,
    )
    objective = SamObjective(LossWeights(cfg.focal_weight, cfg.dice_weight, cfg.iou_weight))
    evaluate = make_evaluation(cfg, data, top, mixture, device)
    with stop_on_signals() as stop, Bar("training", pace.steps, "steps", done=progress.step) as bar:

        def show(metrics: dict[str, float]) -> None:
            bar.advance(note=f"loss {metrics['loss']:.3f}")

        fit(
            top,
            batches,
            objective,
            evaluate,
            optimizer,
            schedule,
            run,
            accelerator,
            pace,
            progress,
            stop,
            show,
        )
    accelerator.end_training()
    draw_curves(run.metrics(), run.path / "curves.png")
    if progress.step < pace.steps:
        raise Interrupted(
            f"stopped at step {progress.step} of {pace.steps}; go on with --out {run.path} --resume"
        )
    best = "nothing held out to score" if progress.best is None else f"held-out mIoU {progress.best:.3f}"
    say(
        f"{run.path}: best checkpoint at step {progress.best_step}, {best}; curves in {run.path / 'curves.png'}"
    )
    return 0


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


def set_pace(cfg: TrainTopConfig, rows: int) -> Pace:
    if cfg.steps and cfg.epochs:
        raise UsageError(f"--steps {cfg.steps} and --epochs {cfg.epochs}: give one of them")
    steps = cfg.steps or math.ceil((cfg.epochs or 10) * math.ceil(rows / cfg.batch_size) / cfg.accumulation)
    every = cfg.evaluate_every or max(1, steps // 10)
    return Pace(steps, every, cfg.save_every or every, cfg.accumulation, cfg.mask_budget, cfg.clip)


def make_optimizer(cfg: TrainTopConfig, top: Top, steps: int):
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
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def make_evaluation(
    cfg: TrainTopConfig, data: CachedData, top: Top, mixture: PromptMixture, device: torch.device
) -> partial:
    """Scores `top` on held-out rows, or on rows of --eval-store, always the same ones."""
    if cfg.eval_store:
        other = CachedData.open(
            cfg.eval_store, annotations=None, partial=cfg.partial, held_out=0, seed=cfg.seed
        )
        if other.store.spec.encoder_sha256 != data.store.spec.encoder_sha256:
            raise StoreError(f"--eval-store {cfg.eval_store}: was made by another encoder than {cfg.store}")
        data = other.holding_out([int(row) for row in other.rows])
    rows = data.held_out[: cfg.evaluate_images]
    return partial(mean_scores, top, data, rows, mixture, cfg.seed, cfg.mask_budget, device)


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
