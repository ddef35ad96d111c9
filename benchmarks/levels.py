"""What storage does to a level and to a training step, and how far a flipped embedding is from the flipped image's.

    SAMCACHE_TEST_DATA=/data python benchmarks/levels.py

Levels of real images by `nano`, in fp32, are held against what every storage type makes of them: the levels
themselves, then loss and gradients of one training step, for SAM's decoder and for an HQ head. Then the levels of
mirrored images against mirrored levels: could a cache skip embedding the mirror image?
"""

import argparse
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from measure import describe_machine, table, write_results
from real_sets import sets
from torch import Tensor

from sam_cache.batches import LiveImages, Preprocessing, Sampling, Visit, collate
from sam_cache.data import open_dataset, parse_prompts
from sam_cache.model import Sam, freeze, load_sam
from sam_cache.quantisation import dequantise, quantise
from sam_cache.stages.decoding import SamObjective, predict
from sam_cache.training import LossWeights
from sam_cache.types import Batch

Levels = dict[str, Tensor]
NAMES = ("crackforest", "chasedb1", "nuclei", "fruits_nuts")
# Storage type of neck and early; int8 for the early level alone is what saves most for least.
STORED = {"fp16": ("fp16", "fp16"), "bf16": ("bf16", "bf16"), "early int8": ("fp16", "int8"), "int8": ("int8", "int8")}


def store(levels: Levels, types: tuple[str, str]) -> Levels:
    """The levels as they come back from a store of these types."""
    found = {}
    for name, dtype in zip(("neck", "early"), types, strict=True):
        if dtype == "int8":
            parts = [torch.stack(part) for part in zip(*map(quantise, levels[name]), strict=True)]
            companions = dict(zip((name, f"{name}_scale", f"{name}_offset"), parts, strict=True))
            found[name] = dequantise(companions, name)
        else:
            found[name] = levels[name].to({"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]).float()
    return found


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative: the norm of the difference over the norm."""
    return ((found - expected).norm() / expected.norm()).item()


def read(knobs: dict, sampling: Sampling, how: Preprocessing, resolution: int, images: int) -> Batch:
    dataset = open_dataset(
        **{"kind": knobs["dataset"]} | {key: value for key, value in knobs.items() if key != "dataset"}
    )
    reader = LiveImages(dataset, how, resolution, sampling)
    rows = np.linspace(0, len(dataset.images) - 1, images).astype(int).tolist()
    return collate([example for row in rows if (example := reader.read(Visit(row))) is not None])


def take_step(sam: Sam, batch: Batch, levels: Levels) -> tuple[float, Tensor]:
    """Loss per prompt, and the gradients of all that is trained, end to end."""
    sam.zero_grad(set_to_none=True)
    total = next(SamObjective(LossWeights.of("points"), "points")(sam, replace(batch, levels=sam.prepare(levels))))
    (total["loss"] / len(batch.prompts)).backward()
    gradients = [p.grad.flatten() for p in sam.parameters() if p.grad is not None]
    return total["loss"].item() / len(batch.prompts), torch.cat(gradients)


def compare_storage(heads: dict[str, Sam], batch: Batch) -> list[dict]:
    with torch.no_grad():
        live = heads["hq"].image_encoder(batch.pixels, batch.content_hw)
    exact = {name: take_step(sam, batch, live) for name, sam in heads.items()}
    rows = []
    for name, types in STORED.items():
        stored = store(live, types)
        row = {"stored": name, **{level: distance(stored[level], live[level]) for level in live}}
        for head, sam in heads.items():
            loss, gradient = take_step(sam, batch, stored)
            row[f"{head}_loss"] = abs(loss - exact[head][0]) / exact[head][0]
            row[f"{head}_gradient"] = distance(gradient, exact[head][1])
        rows.append(row)
    return rows


@torch.no_grad()
def compare_flips(heads: dict[str, Sam], batch: Batch) -> dict:
    """Images fill the square, so that mirroring it mirrors the image."""
    encoder, sam = heads["hq"].image_encoder, heads["sam"]  # one encoder in both; that of hq gives both levels
    levels = encoder(batch.pixels, batch.content_hw)
    of_mirrored = encoder(batch.pixels.flip(3), batch.content_hw)
    mirrored = {name: level.flip(3) for name, level in levels.items()}
    boxes = batch.prompts.boxes_xyxy_input[:, [2, 1, 0, 3]].clone()
    boxes[:, [0, 2]] = sam.size.input_size - boxes[:, [0, 2]]
    asked = replace(batch, prompts=replace(batch.prompts, boxes_xyxy_input=boxes))
    wanted = batch.targets.masks.flip(2) >= 0.5

    def mean_iou(levels: Levels) -> float:
        masks = predict(sam, replace(asked, levels=sam.prepare(levels)))[0] > 0
        unions = (masks | wanted).sum((1, 2)).clamp(min=1)
        return ((masks & wanted).sum((1, 2)) / unions).mean().item()

    others = {name: level.roll(1, 0) for name, level in of_mirrored.items()}  # another image's, for scale
    return {
        **{f"{name}_distance": distance(mirrored[name], of_mirrored[name]) for name in levels},
        **{f"{name}_between_images": distance(others[name], of_mirrored[name]) for name in levels},
        "iou_of_mirrored_image": mean_iou(of_mirrored),
        "iou_of_mirrored_levels": mean_iou(mirrored),
    }


def render(result: dict) -> str:
    head = ["set", "stored as", "neck", "early", "`sam` loss", "gradients", "`hq` loss", "gradients"]
    errors = ("neck", "early", "sam_loss", "sam_gradient", "hq_loss", "hq_gradient")
    return table(
        head,
        [[row["set"], row["stored"], *(f"{row[error]:.1e}" for error in errors)] for row in result["storage"]],
    )


def render_flips(result: dict) -> str:
    head = ["set", "neck: mirrored", "other image", "early: mirrored", "other image",
            "IoU, mirror image", "IoU, mirrored neck"]  # fmt: skip
    distances = [f"{level}_{what}" for level in ("neck", "early") for what in ("distance", "between_images")]
    scores = [f"iou_of_mirrored_{what}" for what in ("image", "levels")]
    return table(
        head,
        [
            [row["set"], *(f"{row[name]:.2f}" for name in distances), *(f"{row[name]:.3f}" for name in scores)]
            for row in result["flips"]
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = os.environ.get("SAMCACHE_TEST_DATA")
    parser.add_argument("--data", type=Path, default=data, required=data is None, help="folder of the real sets")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--input-size", type=int, default=448)
    arguments = parser.parse_args()
    heads = {"sam": load_sam("nano", input_size=arguments.input_size)}
    heads["hq"] = load_sam("nano", input_size=arguments.input_size, hq="hq")
    freeze(heads["sam"], {"prompt", "decoder"})
    freeze(heads["hq"], {"head"})
    sampling = Sampling(parse_prompts("box"), seed=0, training=False, max_objects=16)
    how = Preprocessing(arguments.input_size, fit="squash")
    storage, flips = [], []
    with tempfile.TemporaryDirectory() as scratch:
        known = sets(arguments.data, Path(scratch))
        for name in NAMES:
            batch = read(known[name], sampling, how, heads["sam"].size.mask_size, arguments.images)
            storage += [{"set": name, **row} for row in compare_storage(heads, batch)]
            flips.append({"set": name, **compare_flips(heads, batch)})
    settings = {name: getattr(arguments, name) for name in ("images", "input_size")} | {
        "model": "nano",
        "prompts": "box",
    }
    result = {"settings": settings, "storage": storage, "flips": flips, "machine": describe_machine()}
    print(render(result), render_flips(result), sep="\n\n")
    write_results("levels_cpu", result)


if __name__ == "__main__":
    main()
