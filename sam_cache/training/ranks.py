"""What the processes of a run tell one another; each of these is a no-op in a run of one process.

Gradients are summed here once per step, and not by DistributedDataParallel, which reduces in every
backward: ranks with unequal numbers of backwards, or with none, would wait for each other for ever.
"""

from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn

from sam_cache.errors import SamcacheError


def join_ranks(device: torch.device) -> None:
    """Let the processes that torchrun has started find each other; does nothing where there is one."""
    PartialState(cpu=device.type == "cpu")


def is_alone() -> bool:
    return not (dist.is_available() and dist.is_initialized())


def sum_over_ranks(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Each value summed over ranks, in double precision; a name may be missing on some ranks."""
    if is_alone():
        return values
    names = sorted({name for found in gather(sorted(values)) for name in found})
    total = torch.tensor([values.get(name, 0.0) for name in names], dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return dict(zip(names, total.tolist(), strict=True))


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank: what one decides, all do."""
    if is_alone():
        return flag
    raised = torch.tensor(int(flag), device=device)
    dist.all_reduce(raised, dist.ReduceOp.MAX)
    return bool(raised)


def gather(item: Any) -> list[Any]:
    """What every rank passed in, by rank."""
    if is_alone():
        return [item]
    items: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def agree(item: Any) -> Any:
    """What rank 0 passed in, on all ranks."""
    if is_alone():
        return item
    items = [item]
    dist.broadcast_object_list(items, src=0)
    return items[0]


@torch.no_grad()
def sum_gradients(network: nn.Module) -> None:
    """Sum the gradients of all trained parameters over ranks, in one message.

    A gradient missing on some ranks counts as zeros there. One missing on all of them stays missing: an
    optimizer leaves such a parameter alone, but decays one whose gradient is zero.
    """
    if is_alone():
        return
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    parts: list[Tensor] = [
        torch.zeros_like(parameter).flatten() if parameter.grad is None else parameter.grad.flatten()
        for parameter in trained
    ]
    present = parts[0].new_tensor([parameter.grad is not None for parameter in trained])
    total = torch.cat([*parts, present])
    dist.all_reduce(total)
    *summed, present = total.split([len(part) for part in [*parts, present]])
    for parameter, part, ranks in zip(trained, summed, present.tolist(), strict=True):
        parameter.grad = part.view_as(parameter) if ranks else None


def same_parameters(network: nn.Module) -> None:
    """Raises SamcacheError unless all ranks start from the same weights."""
    if is_alone():
        return
    # On the CPU, because GPUs of unlike make may add the same numbers up to another sum.
    total = [(name, float(parameter.detach().cpu().double().sum())) for name, parameter in network.named_parameters()]
    for rank, other in enumerate(gather(total)):
        if differing := [name for (name, one), (_, two) in zip(total, other, strict=True) if one != two]:
            raise SamcacheError(
                f"rank {rank} has other weights than this one, first {differing[0]}; give all machines the same files"
            )
