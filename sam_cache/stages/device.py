"""Which device a stage computes on, and in what precision."""

import resource
import sys

import torch

from sam_cache.errors import UsageError
from sam_cache.ranks import Ranks
from sam_cache.stages.allocation import keep_freed_memory


def pick_device(asked: str | None, ranks: Ranks) -> torch.device:
    """The device asked for, else cuda where there is one, else cpu; each local rank has its own GPU."""
    kind = asked or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: this machine has no CUDA device; use --device cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: this machine has no Metal device; use --device cpu")
    if kind == "cuda" and ranks.local >= torch.cuda.device_count():
        raise UsageError(
            f"LOCAL_RANK={ranks.local}: this machine has {torch.cuda.device_count()} CUDA devices; "
            "start one process for each"
        )
    if kind == "cpu":
        keep_freed_memory()
    return torch.device(kind, ranks.local) if kind == "cuda" else torch.device(kind)


def pick_precision(asked: str | None, device: torch.device, flag: str) -> str:
    """The precision asked for, else bf16 on cuda and fp32 elsewhere."""
    precision = asked or ("bf16" if device.type == "cuda" else "fp32")
    if precision == "fp16" and device.type == "cpu":
        raise UsageError(f"{flag} fp16: a CPU computes in fp32 or bf16")
    return precision


def pick_mask_budget(asked: int | None, device: torch.device) -> int:
    """Prompts to decode at once: enough to fill a GPU; on a CPU few, since there fresh memory costs most."""
    return asked or (64 if device.type == "cuda" else 16)


def peak_memory(device: torch.device) -> int:
    """Bytes at this process's peak: those PyTorch took of a GPU, else the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024  # Linux counts in KiB
