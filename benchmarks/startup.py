"""What is waited for before anything runs: help, annotations, and the first batch.

    python benchmarks/startup.py [--rounds 10] [--rows 1000000] [--objects 5] [--scale 1.0]     # about four minutes

- `help`: `samcache --help` and `samcache embed --help` from the start of the process to its end, beside a bare
  Python and one that imports torch, in turn; seconds of wall clock and of the processor.
- `annotations`: a generated file with as many images, objects and bytes as lvis_v1_train.json, opened in a fresh
  process that has imported everything first, by us and by pycocotools; memory is the growth of the process's peak.
- `first_batch`: a simulated store of `--rows` rows (see `opening.py`, which shows how this grows) with `--objects`
  objects each: from nothing but imports to the first batch of 8 rows with masks and prompts, what `samcache train-top`
  does before its first step. The page cache is warm.

The targets are those of a quiet machine with two cores: help under 0.3 s without importing torch, annotations under
10 s, the first batch under 3 s.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from measure import alternate, describe_machine, table, write_results

TESTS = Path(__file__).parents[1] / "tests" / "data"  # where the program is that writes annotations of LVIS's size
TARGETS = {"help": 0.3, "annotations": 10.0, "first_batch": 3.0}
COMMANDS = {
    "samcache --help": ["-m", "sam_cache", "--help"],
    "samcache embed --help": ["-m", "sam_cache", "embed", "--help"],
    "python -c pass": ["-c", "pass"],
    "python -c 'import torch'": ["-c", "import torch"],
}
WATCHED = ("torch", "zarr", "cv2", "numpy", "rich")  # libraries that help has no use for
LOADED = f"""
import contextlib, json, sys
from sam_cache import cli
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(None):
    cli.main(["--help"])
print(json.dumps([name for name in {WATCHED} if name in sys.modules]))
"""


def python(*arguments: str | Path) -> str:
    """What a fresh process prints. Raises RuntimeError with what it complains of."""
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}")
    return done.stdout


def measure_help(rounds: int) -> dict:
    processor: dict[str, list[float]] = {name: [] for name in COMMANDS}

    def start(name: str) -> None:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        python(*COMMANDS[name])
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        processor[name].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)

    seconds = alternate({name: partial(start, name) for name in COMMANDS}, rounds)
    found = {
        name: {"wall_s": statistics.median(times), "processor_s": statistics.median(processor[name][1:])}
        for name, times in seconds.items()
    }
    return {"commands": found, "imported": json.loads(python("-c", LOADED))}


def peak_bytes() -> int:
    """Of this process image; getrusage would also count what the parent held when it forked."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def timed(work: Callable[[], dict]) -> dict:
    """What `work` returns, with its seconds and by how many bytes the peak grew."""
    before, started = peak_bytes(), time.perf_counter()
    found = work()
    return {"seconds": time.perf_counter() - started, "bytes": peak_bytes() - before} | found


def open_annotations(file: Path, by: str) -> dict:
    """In the fresh process."""
    if by == "pycocotools":
        import contextlib

        from pycocotools.coco import COCO

        def work() -> dict:
            with contextlib.redirect_stdout(None):
                found = COCO(file)
            return {"images": len(found.imgs), "objects": len(found.anns)}

    else:
        from sam_cache.data.lvis import open_lvis

        def work() -> dict:
            return {"images": len(open_lvis(None, None, file.parent, file, None).images)}

    return timed(work)


def measure_annotations(scale: float, folder: Path) -> dict:
    sys.path.insert(0, str(TESTS))
    from measure_lvis import write_annotations

    file = folder / "lvis_v1_train.json"
    write_annotations(file, scale)
    found, refused = {}, {}
    for by in ("samcache", "pycocotools"):
        try:
            runs = [
                json.loads(python(__file__, "--open", file, "--by", by)) for _ in range(3 if by == "samcache" else 1)
            ]
            found[by] = sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2]
        except Exception as error:  # whatever a contender dies of is its result
            refused[by] = f"{type(error).__name__}: {error}"
    return {"file_bytes": file.stat().st_size, "opened": found, "not_measured": refused}


def crowd(store, each: int) -> dict:
    """Objects for all rows of a simulated store, `each` times the smallest one of its scene."""
    from sam_cache.batches import object_columns
    from sam_cache.data.synthetic import open_synthetic
    from sam_cache.store import Ragged

    one, rows = object_columns(open_synthetic(1), [(0, 0)]), len(store.row_states)
    place, count = int(np.diff(one["rle"].offsets).argmin()), rows * each
    text = one["rle"][place]
    columns = {
        name: np.repeat(column[place : place + 1], count, axis=0)
        for name, column in one.items()
        if not isinstance(column, Ragged)
    }
    columns |= {"row": np.arange(rows).repeat(each), "id": np.arange(count)}
    return columns | {"rle": Ragged(np.tile(np.frombuffer(text, np.uint8), count), np.arange(count + 1) * len(text))}


def take_first_batch(path: Path) -> dict:
    """In the fresh process."""
    from sam_cache.batches import CachedBatches, Order, Sampling
    from sam_cache.data import parse_prompts
    from sam_cache.stages.cached_data import CachedData

    def work() -> dict:
        steps, begun = {}, time.perf_counter()
        data = CachedData.open(path, annotations=None, partial=False, held_out=0.1, seed=0)
        steps["open"] = time.perf_counter() - begun
        annotator = data.annotator(256, Sampling(parse_prompts("point,box"), seed=0, training=True))
        train = data.train[annotator.has_objects(data.train)]
        order = Order(train, seed=0, looks=data.looks(train))
        steps["order"] = time.perf_counter() - begun - steps["open"]
        batches = iter(CachedBatches(data.store, annotator, order, batch_size=8))
        batch = next(batches)
        steps["batch"] = time.perf_counter() - begun - steps["open"] - steps["order"]
        return {"prompts": len(batch.prompts), "objects": len(data.objects["row"]), "steps": steps}

    return timed(work)


def measure_first_batch(rows: int, each: int, rounds: int, folder: Path) -> dict:
    from opening import simulate

    from sam_cache.store import EmbeddingStore

    path = folder / "rows.zarr"
    simulate(path, rows, compact=True)
    store = EmbeddingStore.open(path)
    store.set_objects("main", crowd(store, each), store.object_attributes())
    runs = [json.loads(python(__file__, "--first-batch", path)) for _ in range(rounds + 1)][1:]
    return sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2] | {"rows": rows}


def render(result: dict) -> str:
    help_, lvis, batch = result["help"], result["annotations"], result["first_batch"]
    commands = [
        [f"`{name}`", f"{row['wall_s']:.2f} s", f"{row['processor_s']:.2f} s"]
        for name, row in help_["commands"].items()
    ]
    slowest = max(help_["commands"][name]["wall_s"] for name in COMMANDS if name.startswith("samcache"))
    others = ", ".join(help_["imported"]) or f"none of {', '.join(WATCHED)}"
    opened = [
        [by, f"{row['seconds']:.1f} s", f"{row['bytes'] / 2**20:,.0f} MiB"] for by, row in lvis["opened"].items()
    ] + [[by, None, None] for by in lvis["not_measured"]]
    steps = batch["steps"]
    return "\n\n".join(
        [
            table(["command", "wall clock", "processor"], commands),
            f"Help takes at most {slowest:.2f} s (target: {TARGETS['help']} s) and imports {others}.",
            table([f"{lvis['file_bytes'] / 2**20:,.0f} MiB of annotations opened by", "in", "memory"], opened),
            f"The target for annotations of LVIS's size was {TARGETS['annotations']:.0f} s.",
            f"The first batch from {batch['rows']:,} rows with {batch['objects']:,} objects came after "
            f"{batch['seconds']:.1f} s (target: {TARGETS['first_batch']:.0f} s): {steps['open']:.1f} s to open the "
            f"store and tell who is held out, {steps['order']:.1f} s for the order, {steps['batch']:.1f} s for the "
            f"batch; {batch['bytes'] / 2**20:,.0f} MiB, most of them the objects' masks.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="of help; annotations and batches have three")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--objects", type=int, default=5, help="of each row")
    parser.add_argument("--scale", type=float, default=1.0, help="of the annotations")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--by", help=argparse.SUPPRESS)
    parser.add_argument("--first-batch", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.open:
        print(json.dumps(open_annotations(options.open, options.by)))
        return
    if options.first_batch:
        print(json.dumps(take_first_batch(options.first_batch)))
        return
    result: dict = {"help": measure_help(options.rounds)}
    print(json.dumps(result["help"]), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        result["annotations"] = measure_annotations(options.scale, Path(folder))
        print(json.dumps(result["annotations"]), flush=True)
        result["first_batch"] = measure_first_batch(options.rows, options.objects, 3, Path(folder))
    settings = {name: getattr(options, name) for name in ("rounds", "rows", "objects", "scale")}
    result |= {"settings": settings, "machine": describe_machine()}
    print(render(result))
    write_results("startup_cpu", result)


if __name__ == "__main__":
    main()
