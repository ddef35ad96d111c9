"""How the packaged `nano` was trained, and what it can do without any tuning.

    python benchmarks/nano.py train --out /tmp/nano          # about an hour on one CPU core
    python benchmarks/nano.py score --data /data             # held-out IoU by prompt kind

Training is `samcache train-full` on generated scenes, in three phases that go on from one another: a small input
first, then rounds of correction as in SAM's own training, then the larger input. Scoring is `samcache eval` without
a run: scenes of seeds that training never saw, and real sets where `--data` has them.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import safetensors.torch
from measure import describe_machine, table, write_results
from real_sets import sets

from sam_cache import EmbedConfig, EvalConfig, ExportConfig, TrainFullConfig, embed, evaluate, export, train_full
from sam_cache.model import fixed_weights, size_of

KINDS = "box,point,centroid,interior,point+3-1"
COMMON = {
    "model": "nano", "dataset": "synthetic", "scenes": 100_000, "scene_seed": 1, "held_out": 0.0005,
    "weight_decay": 0.05, "batch_size": 8, "max_objects": 6, "prompts": "box:2,point:2,centroid,interior,point+3-1",
    "augment": "hflip,vflip,colour:0.2", "mask_budget": 48, "evaluate_every": 100, "evaluate_images": 40,
    "pictures": 0, "threads": 1, "device": "cpu",
}  # fmt: skip
PHASES = (
    {"input_size": 224, "steps": 1500, "corrections": 0, "learning_rate": 8e-4, "least_rate": 3e-4, "warmup": 100},
    {"input_size": 224, "steps": 300, "corrections": 2, "learning_rate": 3e-4, "least_rate": 2e-4, "warmup": 20},
    {"input_size": 448, "steps": 400, "corrections": 1, "learning_rate": 4e-4, "least_rate": 1e-6, "warmup": 20},
)
SCENES = {"dataset": "synthetic", "scenes": 60, "scene_seed": 2}


def train(out: Path) -> None:
    """Each phase from the last one's weights; `out`/nano.safetensors is the last of them, in fp16."""
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "phase0.safetensors"
    safetensors.torch.save_file(fixed_weights(size_of("nano")), checkpoint)
    for number, phase in enumerate(PHASES, start=1):
        run = out / f"phase{number}"
        seed = {"seed": number - 1}  # other scenes first, other prompts
        train_full(TrainFullConfig(checkpoint=checkpoint, out=run, **COMMON, **phase, **seed))
        previous, checkpoint = checkpoint, out / f"phase{number}.safetensors"
        export(ExportConfig(run=run, which="last", checkpoint=previous, out=checkpoint, device="cpu"))
    state = {name: tensor.half() for name, tensor in safetensors.torch.load_file(checkpoint).items()}
    safetensors.torch.save_file(state, out / "nano.safetensors")


def score(name: str, knobs: dict, input_size: int, folder: Path) -> dict:
    """Mean IoU by prompt kind over all images of a dataset."""
    store = folder / "emb.zarr"
    embed(EmbedConfig(model="nano", store=store, input_size=input_size, device="cpu", batch_size=4, **knobs))
    evaluate(
        EvalConfig(store=store, out=folder / "eval", prompts=KINDS, rows="all", device="cpu", overlays=0,
                   average_precision=False)
    )  # fmt: skip
    report = json.loads((folder / "eval" / "report.json").read_text())["untouched"]
    means = {kind: found["all"]["iou"]["mean"] for kind, found in report.items()}
    counts = report["box"]["all"]
    return {
        "set": name,
        "input_size": input_size,
        "images": counts["images"],
        "objects": counts["objects"],
        "iou": means,
    }


def render(result: dict) -> str:
    rows = [
        [row["set"], row["input_size"], row["images"], row["objects"]]
        + [f"{row['iou'][kind]:.3f}" for kind in result["kinds"]]
        for row in result["sets"]
    ]
    return table(["set", "input", "images", "objects", *(f"`{kind}`" for kind in result["kinds"])], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "score"))
    parser.add_argument("--out", type=Path, default=Path("nano"))
    parser.add_argument("--data", type=Path, default=os.environ.get("SAMCACHE_TEST_DATA"))
    arguments = parser.parse_args()
    if arguments.what == "train":
        train(arguments.out)
        return
    with tempfile.TemporaryDirectory() as scratch:
        asked = [("generated scenes", SCENES, size) for size in (224, 448, 1024)]
        if arguments.data:
            real = sets(Path(arguments.data), Path(scratch))
            asked += [(name, real[name], 448) for name in ("nuclei", "fruits_nuts", "crackforest")]
        found = [score(*one, Path(scratch, str(number))) for number, one in enumerate(asked)]
    result = {"kinds": KINDS.split(","), "sets": found, "machine": describe_machine()}
    print(render(result))
    write_results("nano_cpu", result)


if __name__ == "__main__":
    main()
