"""What all benchmarks share: contenders in turn, medians and ratios, and a result that says where it was made."""

import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

Seconds = dict[str, list[float]]  # per contender, one of each round
RESULTS = Path(os.environ.get("SAMCACHE_RESULTS", Path(__file__).parent / "results"))


def alternate(contenders: dict[str, Callable[[], object]], rounds: int, seed: int = 0) -> Seconds:
    """Seconds of each contender in each round; every round runs all of them, in shuffled order.

    One round more is run first and thrown away: it pays for caches, pages and compilation.
    """
    order, shuffle = list(contenders), random.Random(seed)
    seconds: Seconds = {name: [] for name in contenders}
    for number in range(rounds + 1):
        shuffle.shuffle(order)
        for name in order:
            started = time.perf_counter()
            contenders[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def summarise(seconds: Seconds) -> dict[str, dict[str, float]]:
    return {
        name: {"median_s": statistics.median(times), "min_s": min(times), "max_s": max(times), "rounds": len(times)}
        for name, times in seconds.items()
    }


def median_ratio(seconds: Seconds, slower: str, faster: str) -> float:
    """Median over rounds of how many times slower one contender was than another in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[slower], seconds[faster], strict=True))


def describe_machine() -> dict[str, object]:
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("samcache", "torch", "numpy", "zarr", "segment-anything")},
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str:
    """The commit measured; `+` says that the tree held changes on top of it."""
    here = Path(__file__).parent
    ask = ["git", "-C", str(here)]
    found = subprocess.run([*ask, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*ask, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    return found + ("+" if changed else "")


def write_results(name: str, result: dict) -> Path:
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {path}")
    return path


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; what is no text already is shown by `str`, None as 'not measured'."""
    lines = [head, ["---"] * len(head), *rows]
    cells = [["not measured" if cell is None else str(cell) for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
