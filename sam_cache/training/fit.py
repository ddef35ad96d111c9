"""The one training loop."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sam_cache.errors import SamcacheError
from sam_cache.training.checkpoint import Progress, save
from sam_cache.training.ranks import any_rank, gather, sum_gradients, sum_over_ranks
from sam_cache.training.run_folder import RunFolder
from sam_cache.types import Batch


class Batches(Protocol):
    """An endless stream of batches whose place can be saved and restored exactly; None is an empty one."""

    def __iter__(self) -> Iterator[Batch | None]: ...
    def state(self) -> dict[str, int]: ...


@dataclass(frozen=True)
class Pace:
    """How far to train and how often to do what; all in optimizer steps, `patience` in evaluations.

    `best_by` names the metric of an evaluation by which checkpoints are compared; more is better.
    """

    steps: int
    evaluate_every: int
    save_every: int
    accumulation: int = 1
    mask_budget: int = 64
    clip: float = 1.0
    best_by: str = "score"
    patience: int | None = None


# The losses of a batch whose levels are there, in one round or several, each with a graph of its own:
# named sums over its prompts, each prompt weighted; `loss` is what is minimised.
Losses = Callable[[nn.Module, Batch], Iterator[dict[str, Tensor]]]


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
    name_rows: Callable[[list[int]], str] = lambda rows: f"rows {rows}",
) -> Progress:
    """Train from `progress.step` to `pace.steps`, or until `should_stop`; returns where it stands.

    `network` has `encode(batch) -> levels`. The loss of a step is the weighted mean over all prompts of
    its accumulation window, whatever batches, chunks and ranks they came in. All ranks call this
    together, with shares of the same batches; only the first one writes.
    Raises SamcacheError on a loss or gradient that is not finite, naming the images; the last checkpoint
    is kept.
    """
    device, stream = accelerator.device, iter(batches)
    saved = progress.step

    def commit(best: bool) -> None:
        if accelerator.is_main_process:
            save(network, batches.state(), optimizer, run, progress, best)
        accelerator.wait_for_everyone()

    def check(what: str, value: float, window: list[Batch]) -> None:
        if not math.isfinite(value):
            rows = sorted(sum(gather([int(row) for batch in window for row in batch.rows]), []))
            kept = f"{run.path} keeps step {saved}" if saved else "nothing had been saved yet"
            raise SamcacheError(
                f"step {progress.step + 1}: {what} is {value} on {name_rows(rows)}; "
                f"lower --learning-rate or use --precision fp32; {kept}"
            )

    while progress.step < pace.steps and not progress.exhausted(pace.patience):
        if any_rank(should_stop(), device):
            break
        started = time.perf_counter()
        # The divisor must be known before the first backward, so a window is drawn whole.
        window = [batch for batch in islice(stream, pace.accumulation) if batch is not None]
        found = sum_over_ranks({"weight": sum(float(batch.targets.weights.sum()) for batch in window)}, device)
        if not found["weight"]:
            continue  # not one image of the window could be read; the next has others
        sums = {"images": float(sum(len(batch.rows) for batch in window))}
        for batch in window:
            for losses in backpropagate(network, batch.to(device), losses_of, accelerator, found["weight"], pace):
                for name, value in losses.items():
                    sums[name] = sums.get(name, 0.0) + value.detach()
        sums = sum_over_ranks({name: float(value) for name, value in sums.items()}, device)
        images = sums.pop("images")
        metrics = {name: value / found["weight"] for name, value in sums.items()}
        check("loss", metrics["loss"], window)
        sum_gradients(network)
        metrics["gradient_norm"] = float(accelerator.clip_grad_norm_(network.parameters(), pace.clip or math.inf))
        if accelerator.scaler is None:  # else it passes over the step and scales less from there on
            check("gradient", metrics["gradient_norm"], window)
        metrics["learning_rate"] = learning_rate_at(progress.step)
        for group in optimizer.param_groups:
            group["lr"] = metrics["learning_rate"] * group.get("scale", 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.step += 1

        metrics["images_per_second"] = images / (time.perf_counter() - started)
        best = False
        if progress.step % pace.evaluate_every == 0 or progress.step == pace.steps:
            scores = evaluate()
            metrics |= {f"held_out/{name}": value for name, value in scores.items()}
            best = progress.note(scores, pace.best_by)
        if accelerator.is_main_process:
            run.log({"step": progress.step, **metrics})
        accelerator.log(metrics, step=progress.step)
        on_step(metrics)
        if best or progress.step % pace.save_every == 0 or progress.step == pace.steps:
            commit(best)
            saved = progress.step
    if saved != progress.step:
        commit(best=False)
    return progress


def backpropagate(
    network: nn.Module, batch: Batch, losses_of: Losses, accelerator: Accelerator, divisor: float, pace: Pace
) -> Iterator[dict[str, Tensor]]:
    """Add the gradients of a batch to the parameters', chunk by chunk; yields the losses of each.

    The images are encoded once. Where that takes a gradient, in a trained encoder or the HQ head, what the
    rounds have to say to it is collected, by chunk and then for the batch, and sent through it once.
    """
    with accelerator.autocast():
        levels = network.encode(batch)
    collected = _cut_off(levels)
    for chunk in replace(batch, levels=collected).chunks(pace.mask_budget):
        leaves = _cut_off(chunk.levels)
        rounds = losses_of(network, replace(chunk, levels=leaves))
        while True:
            with accelerator.autocast():
                losses = next(rounds, None)
            if losses is None:
                break
            accelerator.backward(losses["loss"] / divisor)
            yield losses
        _pass_on(leaves, chunk.levels)
    _pass_on(collected, levels)


def _cut_off(levels: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same levels without their graph, where gradients gather."""
    return {name: level.detach().requires_grad_(level.requires_grad) for name, level in levels.items()}


def _pass_on(leaves: dict[str, Tensor], levels: dict[str, Tensor]) -> None:
    """Send the gradients that have gathered in `leaves` on through `levels`."""
    names = [name for name, leaf in leaves.items() if leaf.grad is not None]
    if names:
        torch.autograd.backward([levels[name] for name in names], [leaves[name].grad for name in names])
