"""What every training stage does once it knows its network and its data."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from sam_cache.batches import Cursor, Order, Sampling
from sam_cache.config import TrainingKnobs
from sam_cache.data import parse_prompts
from sam_cache.errors import DatasetError, Interrupted, UsageError
from sam_cache.model import PARTS, Top, freeze, parts_of
from sam_cache.pictures import draw_curves
from sam_cache.ranks import Ranks
from sam_cache.stages.decoding import SamObjective
from sam_cache.stages.device import peak_memory, pick_mask_budget
from sam_cache.stages.exam import Data
from sam_cache.stages.progress import Bar, say, stop_on_signals
from sam_cache.stages.report import draw_answers
from sam_cache.stages.run import continue_run, start_run
from sam_cache.stages.schedule import choose_repeats, make_optimizer, set_pace
from sam_cache.stages.scoring import SCORES, Answer, Evaluation
from sam_cache.training import (
    Batches,
    LossWeights,
    Pace,
    Progress,
    RunFolder,
    agree,
    check_trackers,
    fit,
    join_ranks,
    load,
    log_images,
    make_accelerator,
    same_parameters,
)

ENCODER_PARTS = ("encoder", "neck", "adapter")


@dataclass(frozen=True)
class Course:
    """A training stage's own part: what is trained, on what, and what is noted of it.

    `open_batches(order, cursor)` opens the stream of this rank. `files` go into a new run folder.
    `estimate`, in bytes, is what a step should take of the device's memory; None where nothing says.
    """

    stage: str
    network: Top
    data: Data
    exam: Data
    exam_rows: np.ndarray
    open_batches: Callable[[Order, Cursor], Batches]
    record: dict
    files: dict[str, bytes] = field(default_factory=dict)
    layer_decay: float = 1.0
    estimate: int | None = None


def train(cfg: TrainingKnobs, course: Course, device: torch.device, precision: str, ranks: Ranks) -> int:
    """Train as `course` says; returns 0, or raises Interrupted once a checkpoint holds where it stopped."""
    if ranks.world > cfg.batch_size:
        raise UsageError(
            f"WORLD_SIZE={ranks.world}: --batch-size {cfg.batch_size} counts all processes together, so some would "
            f"get nothing; give --batch-size {ranks.world} or more, or start fewer"
        )
    network, data = course.network.to(device), course.data
    repeats = None
    if cfg.sampling != "image":
        repeats = choose_repeats(cfg, data.categories_of(data.train), data.names(data.train))
    order = Order(data.train, cfg.seed, repeats, data.looks(data.train))
    if not len(order):
        raise DatasetError(f"{data.where}: no image to train on has an object; check its masks or annotations")
    mask_budget = pick_mask_budget(cfg.mask_budget, device)
    pace = set_pace(cfg, len(order), mask_budget)
    check_names(cfg)
    objective = SamObjective(loss_weights(cfg, network), cfg.loss, cfg.corrections, cfg.loss_points)
    optimizer, learning_rate_at = make_optimizer(cfg, network, pace.steps, course.layer_decay)
    join_ranks(device)
    run = open_run(cfg, course, ranks)
    knobs = cfg.model_dump(mode="json", by_alias=True)
    accelerator = make_accelerator(device, precision, run.path, cfg.trackers, run.path.name, knobs)
    optimizer = accelerator.prepare(optimizer)
    progress, cursor = Progress(), Cursor()
    if run.resumable:
        progress, place = load(network, optimizer, run)
        cursor = Cursor(**place)
    same_parameters(network)  # on machines that share no disk, a run might go on here and start anew there
    if ranks.rank == 0:
        run.forget_metrics_after(progress.step)
        run.restore_best(progress.best_step)
        tell(course, pace.steps, progress.step, run)
    accelerator.wait_for_everyone()

    def show(row: int, answers: list[Answer]) -> None:
        drawn = {f"held_out/row{row:06d}": draw_answers(course.exam.picture(row), answers)}
        log_images(accelerator, progress.step, drawn)

    examine = Evaluation(
        network, course.exam, spread(course.exam_rows, cfg.evaluate_images), parse_prompts(cfg.prompts), cfg.seed,
        mask_budget, device, ranks, cfg.pictures, show,
    )  # fmt: skip

    def evaluate() -> dict[str, float]:
        with accelerator.autocast():
            return examine()

    started = time.perf_counter()
    try:
        with stop_on_signals() as stop, Bar("training", pace.steps, "steps", done=progress.step) as bar:
            fit(
                network,
                course.open_batches(order, cursor),
                objective,
                evaluate,
                optimizer,
                learning_rate_at,
                run,
                accelerator,
                pace,
                progress,
                stop,
                lambda metrics: bar.advance(note=f"loss {metrics['loss']:.3f}"),
                lambda rows: f"images {', '.join(data.names(np.array(rows)))}",
            )
    finally:
        accelerator.end_training()  # what the trackers hold is written, and their processes end
    if ranks.rank == 0:
        finish(run, progress, course, pace, time.perf_counter() - started, device)
    if progress.step < pace.steps and not progress.exhausted(pace.patience):
        raise Interrupted(f"stopped at step {progress.step} of {pace.steps}; go on with --out {run.path} --resume")
    return 0


def open_run(cfg: TrainingKnobs, course: Course, ranks: Ranks) -> RunFolder:
    """The run folder, made or checked by the first rank alone; an error of its is raised on all."""
    found: RunFolder | Exception | None = None
    if ranks.rank == 0:
        try:
            if cfg.resume:
                found = continue_run(cfg, course.record)
            else:
                found = start_run(cfg, course.stage, course.record, course.files)
        except Exception as error:
            found = error
    found = agree(found)
    if isinstance(found, Exception):
        raise found
    return found


def check_names(cfg: TrainingKnobs) -> None:
    """Raises UsageError for a metric or a tracker that there will not be, before anything is written."""
    check_trackers(cfg.trackers)
    known = ["score", *(f"{score}/{kind}" for kind in parse_prompts(cfg.prompts).kinds for score in SCORES)]
    if cfg.best_by not in known:
        raise UsageError(f"--best-by {cfg.best_by}: unknown metric; these prompts have {', '.join(known)}")


def spread(rows: np.ndarray, count: int) -> np.ndarray:
    """`count` of `rows`, evenly spaced from the first to the last; all where there are no more."""
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]


def make_sampling(cfg: TrainingKnobs) -> Sampling:
    """How training asks for objects."""
    by_object = cfg.sampling == "object"
    mixture = parse_prompts(cfg.prompts)
    return Sampling(mixture, cfg.seed, cfg.box_noise, cfg.max_objects, cfg.scale_sampled, by_object)


def choose_parts(cfg: TrainingKnobs, train: tuple[str, ...], network: Top, *, adapter: bool) -> None:
    """Freeze all of `network` but the parts named in `train`, and the adapter where there is one."""
    without = ENCODER_PARTS if not hasattr(network, "image_encoder") else () if adapter else ("adapter",)
    have = [part for part in PARTS if part not in without and (network.hq or part != "head")]
    if "head" in train and not network.hq:
        raise UsageError(f"--train {','.join(train)}: there is no head without the HQ head; add --head hq")
    if unknown := [part for part in train if part not in have]:
        raise UsageError(f"--train {','.join(train)}: unknown part {unknown[0]!r}; parts are {', '.join(have)}")
    shows_masks = cfg.corrections > 0 or any(
        choice.kind == "noise-mask" for choice in parse_prompts(cfg.prompts).choices
    )
    freeze(network, set(train) | ({"adapter"} if adapter else set()), mask_prompts=shows_masks)


def loss_weights(cfg: TrainingKnobs, network: Top) -> LossWeights:
    """The weights asked for, the loss's own where none are.

    Beside a decoder that stays as it is, the HQ head is left out of the IoU loss: the decoder's scores are of
    its own masks, and only the head's token could bend them.
    """
    default = LossWeights.of(cfg.loss)
    if all(parts_of(name) == ("head",) for name, parameter in network.named_parameters() if parameter.requires_grad):
        default = replace(default, iou=0.0)
    asked = {"mask": cfg.mask_weight, "overlap": cfg.overlap_weight, "iou": cfg.iou_weight}
    return LossWeights(**{name: getattr(default, name) if value is None else value for name, value in asked.items()})


def tell(course: Course, steps: int, done: int, run: RunFolder) -> None:
    """What is about to be trained, in a line or two."""
    network, data = course.network, course.data
    count = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    if done:
        say(f"{run.path}: going on from step {done}")
    images = len(set(data.names(data.train)))
    views = f" in {len(data.train)} views" if images < len(data.train) else ""
    say(f"{images} images to train on{views}, {len(data.held_out)} held out; {count:,} parameters, {steps} steps")
    if course.estimate:
        say(f"memory: about {course.estimate / 2**30:.2f} GiB estimated")


def finish(
    run: RunFolder, progress: Progress, course: Course, pace: Pace, seconds: float, device: torch.device
) -> None:
    """Write summary.json and the curves, and say how it went."""
    peak = peak_memory(device)
    summary = {
        "step": progress.step,
        "best": progress.best,
        "best_step": progress.best_step,
        "seconds": seconds,
        "peak_memory": peak,
        "estimated_memory": course.estimate,
        "trained_parameters": sum(p.numel() for p in course.network.parameters() if p.requires_grad),
    }
    run.write_json("summary.json", summary)
    draw_curves(run.metrics(), run.path / "curves.png")
    estimated = f" ({course.estimate / 2**30:.2f} GiB estimated)" if course.estimate else ""
    whose = "of the GPU" if device.type == "cuda" else "of the whole process"
    say(f"memory: {peak / 2**30:.2f} GiB {whose} at the peak{estimated}")
    if progress.step < pace.steps and progress.exhausted(pace.patience):
        say(f"stopped early: no better score in {progress.since_best} evaluations")
    best = "nothing held out to score" if progress.best is None else f"held-out {pace.best_by} {progress.best:.3f}"
    best = f"best checkpoint at step {progress.best_step}, {best}" if progress.best_step else "not evaluated yet"
    say(f"{run.path}: {best}; curves in {run.path / 'curves.png'}")
