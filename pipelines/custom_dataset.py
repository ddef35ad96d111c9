"""Your own dataset in Python: `python custom_dataset.py [FOLDER]`.

Any source of images and masks becomes a `Dataset`: a list of images, a function that reads one, and a
function that lists the objects of one. Here both are drawn on the fly: bright discs on noise. Everything after
that is the same as on the command line; each stage takes the configuration that `--help` describes.
"""

import sys
from pathlib import Path

import cv2
import numpy as np

from sam_cache import (
    Dataset,
    EmbedConfig,
    EvalConfig,
    ImageRecord,
    ObjectRecord,
    TrainTopConfig,
    embed,
    evaluate,
    mask_to_rle,
    measure_rle,
    train_top,
)

HEIGHT, WIDTH, IMAGES, DISCS = 120, 160, 12, 3


def disc_masks(number: int) -> list[np.ndarray]:
    """Boolean (H, W) masks of one image, without overlap."""
    generator = np.random.default_rng(number)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    centres = [(generator.integers(30, 90), 27 + 53 * place) for place in range(DISCS)]
    return [(y - cy) ** 2 + (x - cx) ** 2 < generator.integers(10, 25) ** 2 for cy, cx in centres]


def read(record: ImageRecord) -> bytes:
    """The image file's bytes: here a PNG made on the spot, usually `path.read_bytes()`."""
    image = np.random.default_rng(record.id).integers(0, 90, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    for shade, mask in enumerate(disc_masks(record.id)):
        image[mask] += np.uint8(100 + 30 * shade)
    return cv2.imencode(".png", image)[1].tobytes()


def objects(number: int) -> tuple[list[ObjectRecord], list[str]]:
    """The objects of image `number`, and one line for each that had to be left out."""
    found = []
    for place, mask in enumerate(disc_masks(number)):
        rle = mask_to_rle(mask)
        box_xywh_image, area = measure_rle(rle, HEIGHT, WIDTH)
        found.append(ObjectRecord(DISCS * number + place, 1, rle, box_xywh_image, area))
    return found, []


def main(folder: Path, model: str = "nano", steps: int = 20) -> None:
    dataset = Dataset(
        images=[ImageRecord(number, f"disc-{number}.png", HEIGHT, WIDTH) for number in range(IMAGES)],
        categories={1: "disc"},
        read=read,
        convert=objects,
    )
    store, run = folder / "discs.zarr", folder / "train-top"
    embed(EmbedConfig(model=model, store=store, shard_rows=4), dataset)
    train_top(TrainTopConfig(store=store, out=run, prompts="box", steps=steps, warmup=5, learning_rate=1e-3))
    evaluate(EvalConfig(store=store, run=run, out=folder / "eval", prompts="box,centroid"))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "discs"))
