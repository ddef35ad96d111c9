"""Run by test_ranks.py as a program: two processes that talk to each other, forked after one import of PyTorch.

two_ranks.py FOLDER   writes what each of them was told to FOLDER/<rank>.json
"""

import json
import os
import socket
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from sam_cache.errors import SamcacheError, UsageError
from sam_cache.training.ranks import (
    agree,
    any_rank,
    gather,
    is_alone,
    join_ranks,
    same_parameters,
    sum_gradients,
    sum_over_ranks,
)

CPU = torch.device("cpu")
WORLD = 2


def talk(rank: int) -> dict:
    join_ranks(CPU)
    error = agree(UsageError("--out: taken") if rank == 0 else None)
    return {
        "alone": is_alone(),
        "sums": sum_over_ranks({"both": 0.1 + rank, ("first", "second")[rank]: 2.5}, CPU),
        "sums_of_one": sum_over_ranks({"loss": 3.0} if rank else {}, CPU),
        "any": [any_rank(rank == raising, CPU) for raising in (-1, 0, 1)],
        "gathered": gather({"rank": rank, "rows": list(range(rank))}),
        "agreed": agree(f"said by {rank}"),
        "error": [type(error).__name__, str(error)],
        "gradients": gradients(rank),
        "weights": {name: compare_weights(rank, shift) for name, shift in (("same", 0.0), ("other", 1e-6))},
    }


def gradients(rank: int) -> dict:
    """Of parameters that both ranks, the second alone and no rank have a gradient for; one is frozen."""
    network = nn.ParameterDict({name: torch.ones(2, 3) for name in ("both", "one", "none", "frozen")})
    network["frozen"].requires_grad_(False)
    network["both"].grad = torch.full((2, 3), rank + 1.0)
    if rank == 1:
        network["one"].grad = torch.arange(6.0).reshape(2, 3)
    sum_gradients(network)
    return {name: None if value.grad is None else value.grad.tolist() for name, value in network.items()}


def compare_weights(rank: int, shift: float) -> str | None:
    network = nn.Linear(2, 2)
    with torch.no_grad():
        network.weight.fill_(1.0)
        network.bias.fill_(0.5 + rank * shift)
    try:
        return same_parameters(network)
    except SamcacheError as error:
        return str(error)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


if __name__ == "__main__":
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(WORLD)}
    workers = []
    for rank in range(WORLD):
        if (worker := os.fork()) == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            told = talk(rank)
            Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(told))
            dist.destroy_process_group()
            sys.exit(0)
        workers.append(worker)
    codes = [os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) for worker in workers]
    sys.exit(max(map(abs, codes)))
