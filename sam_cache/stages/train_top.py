"""Stage 2: train prompt encoder and mask decoder from a store alone."""

import numpy as np

from sam_cache.batches import CachedBatches, Cursor, Sampling
from sam_cache.config import TrainTopConfig
from sam_cache.data import parse_prompts
from sam_cache.errors import Interrupted, StoreError, UsageError
from sam_cache.pictures import draw_curves
from sam_cache.ranks import Ranks
from sam_cache.stages.cached_data import CachedData
from sam_cache.stages.decoding import SamObjective
from sam_cache.stages.device import pick_device, pick_mask_budget, pick_precision
from sam_cache.stages.progress import Bar, say, stop_on_signals
from sam_cache.stages.training_setup import (
    continue_run,
    describe,
    make_evaluation,
    make_optimizer,
    open_top,
    set_pace,
    start_run,
)
from sam_cache.training import LossWeights, Progress, fit, load, make_accelerator


def train_top(cfg: TrainTopConfig) -> int:
    """Train from `--store`; returns 0, or raises Interrupted once a checkpoint holds where it stopped."""
    ranks = Ranks.from_env()
    if ranks.world > 1:
        raise UsageError(f"WORLD_SIZE={ranks.world}: train-top runs in one process; start it without torchrun")
    device = pick_device(cfg.device, ranks)
    precision = pick_precision(cfg.precision, device, "--precision")
    mixture = parse_prompts(cfg.prompts)
    data = CachedData.open(
        cfg.store,
        annotations=cfg.annotations,
        partial=cfg.partial,
        held_out=0 if cfg.eval_store else cfg.held_out,
        seed=cfg.seed,
    )
    top = open_top(cfg, data).to(device)
    sampling = Sampling(mixture, cfg.seed, True, cfg.max_objects, cfg.scale_sampled)
    annotator = data.annotator(top.size.mask_size, sampling)
    rows = np.array([row for row in data.train if row in annotator], dtype=np.int64)
    if not len(rows):
        raise StoreError(f"{cfg.store}: no row with an object is left to train on; lower --held-out or embed more")

    mask_budget = pick_mask_budget(cfg.mask_budget, device)
    pace = set_pace(cfg, len(rows), mask_budget)
    evaluate = make_evaluation(cfg, data, top, mixture, mask_budget, device)
    record = describe(data, rows, top, precision)
    run = continue_run(cfg, record) if cfg.resume else start_run(cfg, record, top)
    accelerator = make_accelerator(device, precision, run.path)
    optimizer, learning_rate_at = make_optimizer(cfg, top, pace.steps)
    top, optimizer = accelerator.prepare(top, optimizer)
    progress, cursor = Progress(), Cursor()
    if run.resumable:
        progress, place = load(top, optimizer, run)
        cursor = Cursor(**place)
        say(f"{run.path}: going on from step {progress.step}")
    run.forget_metrics_after(progress.step)
    count = sum(parameter.numel() for parameter in top.parameters() if parameter.requires_grad)
    say(f"{len(rows)} images to train on, {len(data.held_out)} held out; {count:,} parameters, {pace.steps} steps")

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
    with stop_on_signals() as stop, Bar("training", pace.steps, "steps", done=progress.step) as bar:

        def show(metrics: dict[str, float]) -> None:
            bar.advance(note=f"loss {metrics['loss']:.3f}")

        fit(
            top, batches, objective, evaluate, optimizer, learning_rate_at, run, accelerator, pace, progress, stop, show
        )
    accelerator.end_training()
    draw_curves(run.metrics(), run.path / "curves.png")
    if progress.step < pace.steps:
        raise Interrupted(f"stopped at step {progress.step} of {pace.steps}; go on with --out {run.path} --resume")
    best = "nothing held out to score" if progress.best is None else f"held-out mIoU {progress.best:.3f}"
    say(f"{run.path}: best checkpoint at step {progress.best_step}, {best}; curves in {run.path / 'curves.png'}")
    return 0
