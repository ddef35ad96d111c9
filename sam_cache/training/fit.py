"""The one training loop."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sam_cache.errors import SamcacheError
from sam_cache.training.checkpoint import Progress, save
from sam_cache.training.run_folder import RunFolder
from sam_cache.types import Batch


class Batches(Protocol):
    """An endless stream of batches whose place can be saved and restored exactly."""

    def __iter__(self) -> Iterator[Batch]: ...
    def state(self) -> dict[str, int]: ...


@dataclass(frozen=True)
class Pace:
    """How far to train and how often to do what; all in optimizer steps."""

    steps: int
    evaluate_every: int
    save_every: int
    accumulation: int = 1
    mask_budget: int = 64
    clip: float = 1.0


# The losses of a batch: named sums over its prompts, each prompt weighted; `loss` is what is minimised.
Losses = Callable[[nn.Module, Batch], dict[str, Tensor]]


def fit(
    network: nn.Module,
    batches: Batches,
    losses_of: Losses,
    evaluate: Callable[[], dict[str, float]],
    optimizer: torch.optim.Optimizer,
    learning_rate_at: Callable[[int], float],
    run: RunFolder,
    accelerator: Accelerator,
    pace: Pace,
    progress: Progress,
    should_stop: Callable[[], bool] = lambda: False,
    on_step: Callable[[dict[str, float]], None] = lambda metrics: None,
) -> Progress:
    """Train from `progress.step` to `pace.steps`, or until `should_stop`; returns where it stands.

    The loss of a step is the weighted mean over all prompts of its accumulation window, whatever
    batches and chunks they came in. `evaluate()["score"]` decides which checkpoint is best.
    Raises SamcacheError on a loss that is not finite; the last checkpoint is kept.
    """
    stream = iter(batches)
    saved = progress.step
    while progress.step < pace.steps and not should_stop():
        started = time.perf_counter()
        # The divisor must be known before the first backward, so a window is drawn whole.
        window = [next(stream) for _ in range(pace.accumulation)]
        total_weight = sum(float(batch.targets.weights.sum()) for batch in window)
        sums: dict[str, Tensor] = {}
        for batch in window:
            for chunk in batch.to(accelerator.device).chunks(pace.mask_budget):
                with accelerator.autocast():
                    losses = losses_of(network, chunk)
                accelerator.backward(losses["loss"] / total_weight)
                for name, value in losses.items():
                    sums[name] = sums.get(name, 0.0) + value.detach()
        metrics = {name: float(value) / total_weight for name, value in sums.items()}
        if not math.isfinite(metrics["loss"]):
            rows = [int(row) for batch in window for row in batch.rows]
            raise SamcacheError(
                f"step {progress.step + 1}: loss is {metrics['loss']} on rows {rows}; "
                f"lower --learning-rate or use --precision fp32; {run.path} keeps step {saved}"
            )
        if pace.clip:
            metrics["gradient_norm"] = float(accelerator.clip_grad_norm_(network.parameters(), pace.clip))
        metrics["learning_rate"] = learning_rate_at(progress.step)
        for group in optimizer.param_groups:
            group["lr"] = metrics["learning_rate"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.step += 1

        seconds = time.perf_counter() - started
        metrics["images_per_second"] = sum(len(batch.rows) for batch in window) / seconds
        best = False
        if progress.step % pace.evaluate_every == 0 or progress.step == pace.steps:
            found = evaluate()
            metrics |= {f"held_out/{name}": value for name, value in found.items()}
            score = found.get("score")  # none where nothing is held out: then the last is the best
            if best := score is None or progress.best is None or score > progress.best:
                progress.best, progress.best_step = score, progress.step
        run.log({"step": progress.step, **metrics})
        accelerator.log(metrics, step=progress.step)
        on_step(metrics)
        if best or progress.step % pace.save_every == 0 or progress.step == pace.steps:
            save(network, batches.state(), optimizer, run, progress, best)
            saved = progress.step
    if saved != progress.step:
        save(network, batches.state(), optimizer, run, progress, best=False)
    return progress
