"""How the cost of a training step grows: with objects per image, images per batch, and workers that read.

    python benchmarks/growth.py [--objects 1 8 64 256 700] [--images 1 2 4 8 16] [--rounds 2] [--device cpu|cuda]

Every point is measured in a fresh process, so that its peak of memory is its own: what the process (on a GPU, torch's
allocator) holds at most, less what it held before the batch was made. Time is the median of the rounds after a first
one. A step is what `samcache train-top` does with a batch that is there: forward, loss and backward of prompt encoder
and decoder in chunks of `--mask-budget` prompts, which is what keeps memory flat; box prompts, the top of a released
SAM, fp32 on the CPU and bf16 on a GPU. How opening grows with the rows of a store is in `opening.py`.
"""

import argparse
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from measure import describe_machine, table, write_results
from read_contenders import make_data

from sam_cache.batches import Annotator, CachedBatches, Order, Preprocessing, Sampling, Visit
from sam_cache.data import parse_prompts
from sam_cache.model import Top, load_top
from sam_cache.stages.decoding import SamObjective
from sam_cache.training import LossWeights
from sam_cache.training.fit import Pace, backpropagate
from sam_cache.types import Batch, Prompts, Targets

LOSSES = ("focal-dice", "points")


def make_batch(top: Top, images: int, objects: int) -> Batch:
    """Random embeddings and half-covered masks, a box for each object."""
    size, total = top.size, images * objects
    corners = torch.rand(total, 2, 2).sort(dim=1).values * size.input_size
    prompts = Prompts(
        image_index=torch.arange(images).repeat_interleave(objects),
        kind=torch.zeros(total, dtype=torch.long),
        points_xy_input=torch.zeros(0, 2),
        labels=torch.zeros(0, dtype=torch.long),
        offsets=torch.zeros(total + 1, dtype=torch.long),
        boxes_xyxy_input=corners.flatten(1),
        has_box=torch.ones(total, dtype=torch.bool),
        has_mask=torch.zeros(total, dtype=torch.bool),
        chance=torch.rand(total, 2),
    )
    targets = Targets(
        masks=(torch.rand(total, size.mask_size, size.mask_size) > 0.5).float(),
        valid=torch.ones(images, size.mask_size, size.mask_size),
        weights=torch.ones(total),
    )
    neck = torch.randn(images, size.neck_channels, size.grid, size.grid)
    return Batch({"neck": neck}, prompts, targets, np.arange(images), np.arange(total))


def measure_step(model: str, images: int, objects: int, loss: str, budget: int, rounds: int, device: str) -> dict:
    torch.manual_seed(0)
    cuda = device == "cuda"
    accelerator = Accelerator(cpu=not cuda, mixed_precision="bf16" if cuda else "no")
    top = load_top(model).to(accelerator.device)
    objective = SamObjective(LossWeights.of(loss), loss)
    pace = Pace(steps=1, evaluate_every=1, save_every=1, mask_budget=budget)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    batch = make_batch(top, images, objects).to(accelerator.device)

    def step() -> None:
        top.zero_grad(set_to_none=True)
        for _ in backpropagate(top, batch, objective, accelerator, len(batch.prompts), pace):
            pass
        if cuda:
            torch.cuda.synchronize()

    seconds = median_seconds(step, rounds)
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "images": images,
        "objects": objects,
        "loss": loss,
        "seconds": seconds,
        "bytes": peak if cuda else peak - before,
    }


def measure_annotation(objects: int, rounds: int) -> dict:
    """Prompts and 256x256 targets of one image with so many objects: those of a generated scene, again and again."""
    with tempfile.TemporaryDirectory() as folder:
        store = make_data(Path(folder), rows=1, channels=1, codec="raw").store
        many = {name: repeat(column, objects) for name, column in store.objects().items()}
        many["id"] = np.arange(objects)
        sampling = Sampling(parse_prompts("box"), seed=0, training=True)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        # Nothing known: else it remembers the masks.
        annotator = Annotator(store.images, many, Preprocessing(1024), 256, sampling, known_bytes=0)
        seconds = median_seconds(lambda: annotator.annotate([Visit(0)]), rounds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"objects": objects, "seconds": seconds, "bytes": peak - before}


def median_seconds(work: Callable[[], object], rounds: int) -> float:
    """Over the rounds after a first one; what is short has up to nine, so that one that is held up does not count."""
    seconds: list[float] = []
    while len(seconds) <= rounds or (len(seconds) < 10 and sum(seconds) < 3):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def repeat(column, count: int):
    """A column's items over and over, `count` of them; a column of bytes stays one."""
    index = np.arange(count) % len(column)
    if isinstance(column, np.ndarray):
        return column[index]
    return type(column).from_list([column[number] for number in index.tolist()])


def measure_workers(threads: int, rows: int, rounds: int) -> dict:
    """Batches of 8 rows with boxes and masks, from a store, by so many reading and as many annotating threads."""
    with tempfile.TemporaryDirectory() as folder:
        store = make_data(Path(folder), rows=rows, channels=256, codec="raw").store
        sampling = Sampling(parse_prompts("box"), seed=0, training=True)
        annotator = Annotator(store.images, store.objects(), Preprocessing(1024), 256, sampling)
        batches = iter(CachedBatches(store, annotator, Order(np.arange(rows), 0), batch_size=8, threads=threads))
        seconds = []
        for _ in range(rounds + 1):
            started = time.perf_counter()
            for _ in islice(batches, rows // 8):
                pass
            seconds.append(time.perf_counter() - started)
    return {"threads": threads, "first_epoch_rows_per_s": rows / seconds[0],
            "rows_per_s": rows / statistics.median(seconds[1:])}  # fmt: skip


def alone(function, *arguments) -> dict:
    """In a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        found = pool.submit(function, *arguments).result()
    print(function.__name__, found, file=sys.stderr, flush=True)
    return found


def render(result: dict) -> str:
    settings = result["settings"]

    def cells(found: list[dict], **wanted) -> list[str]:
        one = next(row for row in found if all(row[key] == value for key, value in wanted.items()))
        return [f"{1000 * one['seconds']:,.0f} ms", f"{one['bytes'] / 2**20:.0f} MiB"]

    objects = [
        [count]
        + [cell for loss in LOSSES for cell in cells(result["objects"], objects=count, loss=loss)]
        + cells(result["annotation"], objects=count)
        for count in settings["objects"]
    ]
    images = [
        [count, *(cell for loss in LOSSES for cell in cells(result["images"], images=count, loss=loss))]
        for count in settings["images"]
    ]
    workers = [[row["threads"], f"{row['first_epoch_rows_per_s']:.0f}", f"{row['rows_per_s']:.0f}"]
               for row in result["workers"]]  # fmt: skip
    steps = [f"step, {loss}{what}" for loss in LOSSES for what in ("", ": memory")]
    return "\n\n".join(
        [
            f"One image, by its objects (`--mask-budget {settings['mask_budget']}`):",
            table(["objects", *steps, "prompts and targets made", "memory"], objects),
            f"{settings['prompts']} objects an image, by the images of a batch:",
            table(["images", *steps], images),
            "Rows a second, with boxes and masks, delivered by so many threads for each of reading and annotating:",
            table(["threads", "first epoch", "later epochs"], workers),
        ]
    )


def draw(result: dict) -> Figure:
    figure = Figure(figsize=(8, 3))
    seconds, memory = figure.subplots(1, 2)
    for loss in LOSSES:
        rows = [row for row in result["objects"] if row["loss"] == loss]
        counts = [row["objects"] for row in rows]
        seconds.plot(counts, [row["seconds"] for row in rows], marker="o", label=f"step, {loss}")
        memory.plot(counts, [row["bytes"] / 2**20 for row in rows], marker="o", label=f"step, {loss}")
    counts = [row["objects"] for row in result["annotation"]]
    seconds.plot(counts, [row["seconds"] for row in result["annotation"]], marker="o", label="prompts and targets")
    for axes, what in ((seconds, "seconds"), (memory, "MiB")):
        axes.set(xscale="log", yscale="log", xlabel="objects in the image", ylabel=what)
        axes.grid(alpha=0.3)
    seconds.legend(frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, nargs="+", default=[1, 8, 64, 256, 700])
    parser.add_argument("--images", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--prompts", type=int, default=8, help="objects an image where images are counted")
    parser.add_argument("--mask-budget", type=int, default=16)
    parser.add_argument("--rows", type=int, default=256, help="of the store that workers read")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--model", default="nano", help="its top is as large as that of every released SAM")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    step = (options.mask_budget, options.rounds, options.device)
    result = {
        "objects": [
            alone(measure_step, options.model, 1, count, loss, *step) for count in options.objects for loss in LOSSES
        ],
        "images": [
            alone(measure_step, options.model, count, options.prompts, loss, *step)
            for count in options.images
            for loss in LOSSES
        ],
        "annotation": [alone(measure_annotation, count, options.rounds) for count in options.objects],
        "workers": [alone(measure_workers, threads, options.rows, options.rounds) for threads in (1, 2)],
        "settings": vars(options),
        "machine": describe_machine(),
    }
    print(render(result))
    write_results(f"growth_{options.device}", result)


if __name__ == "__main__":
    main()
