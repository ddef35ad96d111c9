"""Which device a stage computes on, and in what precision."""

import ctypes
import resource
import sys

import torch

from sam_cache.errors import UsageError
from sam_cache.ranks import Ranks


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


def keep_freed_memory() -> None:
    """Let this process keep, for the next tensor, what a tensor has freed: up to a GiB, where the C library is glibc.

    On a CPU PyTorch asks it for the memory of every result. It gives blocks of some MiB back to the system at once,
    and the first touch of each page of the next one costs more than many of the operations on it: of the encoder's
    time 5% to 20%.
    """
    trim_threshold, mmap_threshold = -1, -3  # malloc.h; mallopt returns 0 for what it does not do
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    # Older ones take no more than 32 MiB. The order matters: a limit set by hand ends all adapting of the other.
    if mallopt and (mallopt(mmap_threshold, 64 * 2**20) or mallopt(mmap_threshold, 32 * 2**20)):
        mallopt(trim_threshold, 2**30)


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
