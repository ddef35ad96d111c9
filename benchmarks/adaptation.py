"""When is the cache enough, and when are adapters worth it? The same seconds for every way of adapting SAM.

    SAMCACHE_TEST_DATA=/data python benchmarks/adaptation.py --seconds 60

Every contender starts from the packaged `nano` and gets the same images, held-out images, box prompts, seed and
seconds; for the cache, embedding counts too. Each training is a process of its own. A few steps are run first to
learn how long one takes, so that the learning rate's cosine ends with the time. Scores are `samcache eval`'s, on
held-out images at their own resolution.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from measure import describe_machine, table, write_results
from real_sets import interval, sets

CONTENDERS = ("train-top", "sa", "lora", "spm", "none")
BATCH = 4
PROBE = 6  # steps run to learn the pace; the first two are not counted


@dataclass(frozen=True)
class Child:
    seconds: float
    peak_bytes: int


def samcache(*arguments: object) -> Child:
    """Run a command in a process of its own; its output is shown only when it fails."""
    command = [sys.executable, "-m", "sam_cache", *map(str, arguments)]
    started = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            said.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{said.read().decode()}")
    return Child(time.perf_counter() - started, usage.ru_maxrss * 1024)


def flags(knobs: dict) -> list[object]:
    return [part for name, value in knobs.items() for part in (f"--{name.replace('_', '-')}", value)]


def seconds_per_step(run: Path) -> float:
    """From the log: the batch size over images per second, the median of the steps after the first two."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][2:]
    return BATCH / statistics.median(line["images_per_second"] for line in lines)


def measure(contender: str, dataset: dict, input_size: int, seconds: float, folder: Path) -> dict:
    """Adapt for `seconds`, then score."""
    folder.mkdir(parents=True)
    common = {"prompts": "box", "held_out": 0.2, "batch_size": BATCH, "max_objects": 8, "learning_rate": 5e-4,
              "warmup": 10, "pictures": 0, "threads": 1, "device": "cpu"}  # fmt: skip
    source = {**dataset, "model": "nano", "input_size": input_size}
    spent, peak = 0.0, 0
    if contender == "train-top":
        store = folder / "emb.zarr"
        child = samcache("embed", *flags(source), "--store", store, "--batch-size", 4, "--device", "cpu")
        spent, peak = child.seconds, child.peak_bytes
        command = ["train-top", "--store", store]
    else:
        command = ["train-full", *flags(source), "--adapter", contender]
    probe = ["--steps", PROBE, "--evaluate-every", PROBE, "--evaluate-images", 1, "--out", folder / "probe"]
    samcache(*command, *flags(common), *probe)
    steps = max(1, int((seconds - spent) / seconds_per_step(folder / "probe")))
    run = folder / "run"
    once = ["--steps", steps, "--evaluate-every", steps, "--evaluate-images", 1, "--out", run]
    child = samcache(*command, *flags(common), *once)
    summary = json.loads((run / "summary.json").read_text())
    stored = ["--store", store] if contender == "train-top" else []
    report = evaluate(folder, "--run", run, *stored)
    return {
        "contender": contender,
        "steps": steps,
        "seconds": spent + summary["seconds"],
        "embedding_seconds": spent,
        "peak_memory": max(peak, child.peak_bytes),
        "trained_parameters": summary["trained_parameters"],
        "untouched": report["untouched"]["box"]["all"],
        "tuned": report["tuned"]["box"]["all"],
        "gain": report["gain"]["box"]["all"],
    }


def evaluate(folder: Path, *arguments: object) -> dict:
    out = folder / "eval"
    samcache("eval", *arguments, "--prompts", "box", "--out", out, "--overlays", 0, "--no-average-precision",
             "--device", "cpu")  # fmt: skip
    return json.loads((out / "report.json").read_text())


def render(result: dict) -> str:
    names = {"train-top": "`train-top` (cache)", "none": "`--adapter none`, all weights"}
    rows = []
    for name, found in result["sets"].items():
        first = found[0]["untouched"]
        untouched = [f"{first[score]['mean']:.3f}" for score in ("iou", "boundary_iou")]
        rows.append([f"{name} ({first['images']} images, {first['objects']} objects)", "untouched", "", "", ""])
        rows[-1] += [*untouched, "", ""]
        rows += [
            ["", names.get(row["contender"], f"`--adapter {row['contender']}`")]
            + [f"{row['trained_parameters'] / 1e6:.2f}", row["steps"], f"{row['seconds']:.0f}"]
            + [f"{row['tuned'][score]['mean']:.3f}" for score in ("iou", "boundary_iou")]
            + [interval(row["gain"]["iou"]), f"{row['peak_memory'] / 2**30:.2f}"]
            for row in found
        ]
    head = ["set", "what is trained", "M parameters", "steps", "seconds", "mIoU", "boundary IoU", "gain [95%]", "GiB"]
    return table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = os.environ.get("SAMCACHE_TEST_DATA")
    parser.add_argument("--data", type=Path, default=data, required=data is None, help="folder of the real sets")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--input-size", type=int, default=448)
    arguments = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        datasets = sets(Path(arguments.data), Path(scratch))
        for name in ("crackforest", "nuclei"):
            results[name] = [
                measure(one, datasets[name], arguments.input_size, arguments.seconds, Path(scratch, name, one))
                for one in CONTENDERS
            ]
    settings = {"seconds": arguments.seconds, "input_size": arguments.input_size, "model": "nano", "prompts": "box"}
    result = {"settings": settings, "sets": results, "machine": describe_machine()}
    print(render(result))
    write_results("adaptation_cpu", result)


if __name__ == "__main__":
    main()
