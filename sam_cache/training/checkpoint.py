"""What a run needs to go on: trained parameters, optimizer, progress, place in the data.

The learning rate is a pure function of the step, and so needs no state.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from sam_cache.errors import CheckpointError
from sam_cache.training.run_folder import RunFolder


@dataclass
class Progress:
    """Loop state: saved whole in every checkpoint, so that resumed equals uninterrupted."""

    step: int = 0
    best: float | None = None
    best_step: int = 0


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
                "use the store this run was trained on"
            )
        own[name].data.copy_(value)
