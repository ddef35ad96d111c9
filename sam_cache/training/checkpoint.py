"""What a run needs to go on: trained parameters, optimizer, progress, place in the data.

The learning rate is a pure function of the step, and so needs no state.
"""

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from sam_cache.errors import CheckpointError, UsageError
from sam_cache.training.run_folder import RunFolder


@dataclass
class Progress:
    """Loop state: saved whole in every checkpoint, so that resumed equals uninterrupted.

    `best` is the highest held-out value so far and `best_step` when it was reached; `since_best`
    counts the evaluations since then.
    """

    step: int = 0
    best: float | None = None
    best_step: int = 0
    since_best: int = 0

    def note(self, found: dict[str, float], by: str) -> bool:
        """Take in what an evaluation found; True where this step is the best so far by metric `by`.

        Higher is better, and a tie is not. A value that is not a number is better than none, and
        worse than any number. With {}, where nothing is held out, the last step is the best.
        Raises UsageError for a metric that the evaluation does not have.
        """
        if found and by not in found:
            raise UsageError(f"--best-by {by}: held-out images are not scored by it; use {', '.join(sorted(found))}")
        value = float(found.get(by, math.nan))
        value = None if math.isnan(value) else value
        if found and self.best is not None and (value is None or value <= self.best):
            self.since_best += 1
            return False
        self.best, self.best_step, self.since_best = value, self.step, 0
        return True

    def exhausted(self, patience: int | None) -> bool:
        """True once `patience` evaluations in a row have not been better; None is patience without end."""
        return patience is not None and self.since_best >= patience


def trained_parameters(network: nn.Module) -> dict[str, Tensor]:
    """The parameters that training changes, by name: all that a checkpoint holds."""
    return {name: value.detach() for name, value in network.named_parameters() if value.requires_grad}


def save(
    network: nn.Module,
    place: dict[str, int],
    optimizer: torch.optim.Optimizer,
    run: RunFolder,
    progress: Progress,
    best: bool,
) -> None:
    """Commit a checkpoint; `place` is the batches' state."""
    state = {"progress": asdict(progress), "batches": place}
    run.save(progress.step, trained_parameters(network), optimizer.state_dict(), state, best)


def load(network: nn.Module, optimizer: torch.optim.Optimizer, run: RunFolder) -> tuple[Progress, dict[str, int]]:
    """Restore the last checkpoint; returns the loop's progress and the state of its batches.

    Raises CheckpointError when other parameters were trained than `network` trains now.
    """
    weights, optimizer_state, state = run.load_training()
    if other := weights.keys() ^ trained_parameters(network).keys():
        raise CheckpointError(f"{run.path}: {min(other)} is trained in one run and frozen in the other; keep --train")
    load_trained(network, weights, str(run.path))
    optimizer.load_state_dict(optimizer_state)
    return Progress(**state["progress"]), state["batches"]


def load_trained(network: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Copy trained parameters into `network`, strictly. Raises CheckpointError naming the first misfit."""
    own = dict(network.named_parameters())
    for name, value in weights.items():
        if name not in own or own[name].shape != value.shape:
            found = tuple(own[name].shape) if name in own else "no such parameter"
            raise CheckpointError(
                f"{source}: {name} has shape {tuple(value.shape)}, the model has {found}; "
                "it belongs to another model, adapter or rank: give those it was trained with"
            )
        own[name].data.copy_(value)
