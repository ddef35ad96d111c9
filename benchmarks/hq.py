"""Does the HQ head draw thin things better? Untouched SAM, its decoder tuned and the HQ head tuned, from one store.

    SAMCACHE_TEST_DATA=/data python benchmarks/hq.py --steps 300 --overlays runs/hq_overlays

Every set is embedded once with `nano`, with its early level. All runs then train from that store for the same
number of steps, on the same images, objects and prompts, and are scored together: every prompt goes to all
networks. The loss is SAM's with both parts weighing 1, where it is not HQ-SAM's own.
`--early-dtype int8` repeats it on quantised tokens.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measure import describe_machine, table, write_results
from real_sets import interval, sets

from sam_cache import EmbedConfig, TrainTopConfig, embed, train_top
from sam_cache.data import parse_prompts
from sam_cache.evaluation import Scores, compare, summarise
from sam_cache.model import top_from_bytes
from sam_cache.pictures import save_png
from sam_cache.stages.cached_data import CachedData
from sam_cache.stages.report import draw_answers
from sam_cache.stages.scoring import ask
from sam_cache.stages.tuned_sam import open_tuned_top
from sam_cache.training import RunFolder

NAMES = ("crackforest", "chasedb1", "nuclei")  # thin and branching, thin and branching, small and many
OWN_LOSS = {"loss": "uncertain-points", "iou_weight": 0.0}  # HQ-SAM's, with its learning rate
RUNS = {
    "decoder tuned": {"head": "sam", "train": ("decoder",), "learning_rate": 5e-4},
    "HQ head tuned": {"head": "hq", "train": ("head",), "learning_rate": 1e-3},
    "HQ head tuned, its own loss": {"head": "hq", "train": ("head",), "learning_rate": 1e-3, **OWN_LOSS},
    "HQ head and decoder tuned": {"head": "hq", "train": ("head", "decoder"), "learning_rate": 5e-4},
}
UNTOUCHED = "untouched SAM"


def measure(name: str, knobs: dict, arguments: argparse.Namespace, folder: Path) -> list[dict]:
    store = folder / "emb.zarr"
    embed(EmbedConfig(model=arguments.model, store=store, input_size=arguments.input_size, levels=("neck", "early"),
                      early_dtype=arguments.early_dtype, device="cpu", **knobs))  # fmt: skip
    train = {"prompts": "box", "batch_size": 4, "max_objects": 4, "mask_budget": 32,
             "mask_weight": 1.0, "evaluate_every": arguments.steps, "evaluate_images": 4}  # fmt: skip
    seconds, networks, parameters = {}, {}, {UNTOUCHED: 0}
    for run, own in RUNS.items():
        started = time.perf_counter()
        train_top(TrainTopConfig(store=store, out=folder / run, steps=arguments.steps, device="cpu", held_out=0.2,
                                 seed=arguments.seed, **train, **own))  # fmt: skip
        seconds[run] = time.perf_counter() - started
        networks[run] = open_tuned_top(RunFolder.open(folder / run), "last")
        parameters[run] = RunFolder.open(folder / run).read_json("summary.json")["trained_parameters"]
    data = CachedData.open(
        store, annotations=None, partial=False, held_out=0.2, seed=arguments.seed, levels=("neck", "early")
    )
    networks = {UNTOUCHED: top_from_bytes(data.store.base)} | networks
    scores: dict[str, list] = {network: [] for network in networks}
    rows, kinds = data.held_out.tolist(), parse_prompts("box").kinds
    for number, found in enumerate(ask(networks, data, rows, kinds, arguments.seed, 32, torch.device("cpu"))):
        answers = found["box"]
        for network in networks:
            scores[network] += [answer.scores[network] for answer in answers]
        if arguments.overlays and number < 3:
            picture = draw_answers(data.picture(answers[0].row), answers)
            save_png(arguments.overlays / f"{name}-row{answers[0].row:06d}.png", picture)
    columns = {network: Scores.of(found) for network, found in scores.items()}
    return [
        {
            "set": name,
            "what": network,
            "parameters": parameters[network],
            "seconds": seconds.get(network),
            "images": len(np.unique(found.image)),
            "objects": len(found),
            **{score: summarise(found)["box"]["all"][score]["mean"] for score in ("iou", "boundary_iou")},
            "gain": {} if network == UNTOUCHED else compare(found, columns[UNTOUCHED])["box"]["all"],
        }
        for network, found in columns.items()
    ]


def render(result: dict) -> str:
    rows = [
        [
            f"{row['set']} ({row['images']} images, {row['objects']} objects)" if row["what"] == UNTOUCHED else "",
            row["what"],
            f"{row['parameters'] / 1e6:.2f}" if row["parameters"] else "",
            f"{row['seconds']:.0f}" if row["seconds"] else "",
            f"{row['iou']:.3f}",
            f"{row['boundary_iou']:.3f}",
            interval(row["gain"]["iou"]) if row["gain"] else "",
        ]
        for row in result["rows"]
    ]
    return table(["set", "what is trained", "M parameters", "seconds", "mIoU", "boundary IoU", "gain [95%]"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = os.environ.get("SAMCACHE_TEST_DATA")
    parser.add_argument("--data", type=Path, default=data, required=data is None, help="folder of the real sets")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--input-size", type=int, default=448)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--early-dtype", default="fp16", choices=("fp32", "fp16", "int8"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overlays", type=Path, help="folder for pictures of three held-out images of each set")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        known = sets(arguments.data, Path(scratch))
        found = [row for name in NAMES for row in measure(name, known[name], arguments, Path(scratch, name))]
    settings = {name: getattr(arguments, name) for name in ("model", "steps", "input_size", "early_dtype", "seed")}
    suffix = "" if arguments.early_dtype == "fp16" else f"_{arguments.early_dtype}"
    result = {"settings": settings, "rows": found, "machine": describe_machine()}
    print(render(result))
    write_results(f"hq{suffix}_cpu", result)


if __name__ == "__main__":
    main()
