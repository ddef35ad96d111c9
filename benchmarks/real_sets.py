"""What does a short training from the cache bring on real images? Held-out scores before and after, per set.

    SAMCACHE_TEST_DATA=/data python benchmarks/real_sets.py --steps 200

Every set is embedded with `nano`, trained with box prompts for the same number of steps and evaluated on
held-out images. nano has seen nothing but generated scenes: the scores show that the pipeline learns from real images
and masks, not how good a pretrained SAM is.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import cv2
import msgspec
import numpy as np
from measure import describe_machine, table, write_results

from sam_cache import EmbedConfig, EvalConfig, TrainTopConfig, embed, evaluate, train_top


def sets(data: Path, scratch: Path) -> dict[str, dict]:
    """Dataset knobs by name."""
    camvid, cracks, nuclei = data / "camvid", data / "crackforest", data / "nuclei_dsb2018" / "stage1_train"
    fruits = data / "fruits_nuts"
    return {
        "nuclei": {"dataset": "masks", "images": nuclei, "masks": nuclei, "mask_pattern": "{dir}/../masks/*"},
        "fruits_nuts": {"dataset": "coco", "images": fruits / "images", "annotations": fruits / "trainval.json"},
        "crackforest": {"dataset": "masks", "images": cracks / "image", "masks": cracks / "derived" / "masks_png"},
        "chasedb1": {
            "dataset": "masks",
            "images": data / "chasedb1",
            "masks": data / "chasedb1",
            "mask_pattern": "{stem}_1stHO.png",
        },
        "lvis (images are noise)": {
            "dataset": "lvis",
            "images": make_placeholders(data / "lvis" / "lvis_val_100.json", scratch / "lvis"),
            "annotations": data / "lvis" / "lvis_val_100.json",
        },
        "camvid": {
            "dataset": "masks",
            "images": camvid / "train",
            "masks": camvid / "trainannot",
            "ignore_values": (11,),
        },
    }


def make_placeholders(annotations: Path, folder: Path) -> Path:
    """Smooth noise of the right sizes, where the images of an annotation file are not at hand."""
    folder.mkdir(parents=True)
    for image in msgspec.json.decode(annotations.read_bytes())["images"]:
        coarse = np.random.default_rng(image["id"]).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        picture = cv2.resize(coarse, (image["width"], image["height"]), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / Path(image["coco_url"]).name), picture)
    return folder


def measure(name: str, knobs: dict, steps: int, input_size: int, folder: Path) -> dict:
    store, run, out = (folder / part for part in ("emb.zarr", "run", "eval"))
    started = time.perf_counter()
    embed(EmbedConfig(model="nano", store=store, input_size=input_size, device="cpu", **knobs))
    embedded = time.perf_counter()
    train = {"prompts": "box", "batch_size": 8, "max_objects": 4, "mask_budget": 32, "learning_rate": 5e-4,
             "mask_weight": 1.0, "evaluate_every": steps, "evaluate_images": 4}  # fmt: skip
    train_top(TrainTopConfig(store=store, out=run, steps=steps, device="cpu", held_out=0.2, **train))
    trained = time.perf_counter()
    evaluate(EvalConfig(store=store, run=run, out=out, prompts="box", device="cpu", overlays=0))
    report = json.loads((out / "report.json").read_text())
    untouched, tuned, gain = (report[key]["box"]["all"] for key in ("untouched", "tuned", "gain"))
    return {
        "set": name,
        "held_out_images": untouched["images"],
        "objects": untouched["objects"],
        "untouched_iou": untouched["iou"]["mean"],
        "tuned_iou": tuned["iou"]["mean"],
        "gain": gain["iou"],
        "untouched_boundary_iou": untouched["boundary_iou"]["mean"],
        "tuned_boundary_iou": tuned["boundary_iou"]["mean"],
        "embed_s": embedded - started,
        "train_s": trained - embedded,
    }


def interval(found: dict[str, float]) -> str:
    return f"{found['mean']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"


def render(result: dict) -> str:
    head = ["set", "held-out images", "objects", "untouched IoU", "tuned IoU", "gain [95%]",
            "untouched boundary IoU", "tuned"]  # fmt: skip
    rows = [
        [row["set"], row["held_out_images"], row["objects"]]
        + [f"{row['untouched_iou']:.3f}", f"{row['tuned_iou']:.3f}", interval(row["gain"])]
        + [f"{row[f'{which}_boundary_iou']:.3f}" for which in ("untouched", "tuned")]
        for row in result["sets"]
    ]
    return f"{result['settings']['steps']} steps.\n\n" + table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = os.environ.get("SAMCACHE_TEST_DATA")
    parser.add_argument("--data", type=Path, default=data, required=data is None, help="folder of the real sets")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--input-size", type=int, default=224)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = [
            measure(name, knobs, arguments.steps, arguments.input_size, Path(scratch, str(number)))
            for number, (name, knobs) in enumerate(sets(arguments.data, Path(scratch)).items())
        ]
    settings = {"steps": arguments.steps, "input_size": arguments.input_size, "prompts": "box", "model": "nano"}
    result = {"settings": settings, "sets": found, "machine": describe_machine()}
    print(render(result))
    write_results("real_sets_cpu", result)


if __name__ == "__main__":
    main()
