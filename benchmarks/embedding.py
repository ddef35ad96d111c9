"""Does anything of `samcache embed` show beside its encoder?

    python benchmarks/embedding.py [--models nano vit_b] [--sizes 640x480 3000x2000] [--device cpu|cuda]

From JPEG files on disk (generated scenes, quality 90, in a temporary folder, in the page cache) to a committed
store: the rows that `embed` makes, without its start (loading weights, making the store). Contenders take turns
in one process, each round into a new store:

- `bare` runs the same encoder on the same images, decoded and resized beforehand, and drops what it makes;
- `fp16` and `int8` embed, with rows stored in that type;
- `fp16_fast` embeds with `--resize fast`;
- `fp16_beside` embeds with decoding and writing in threads beside the encoder, as is done on a GPU; there is no such
  contender there.

A share is the bare encoder's time over that of embedding, the median over rounds: 1 means that decoding, resizing,
quantising, checksums and writing are hidden, or cost nothing beside the encoder. On a CPU the encoder leaves no core
free, so that `embed` does all in turn and what it costs shows: the table of processor time says which costs what. On a
GPU all of it is to be hidden. Weights are random, which does not change the time. On two quiet cores it takes about
eight minutes.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import cv2
import numpy as np
import torch
from encoder_contenders import make_encoder
from measure import alternate, describe_machine, median_ratio, summarise, table, write_results

from sam_cache.batches import Preprocessing, object_columns, pixel_batches
from sam_cache.data import WHOLE, Dataset, Geometry, decode, open_images, to_pixels
from sam_cache.data.synthetic import open_synthetic
from sam_cache.model import SIZES, Encoder
from sam_cache.ranks import Ranks
from sam_cache.stages.device import pick_device
from sam_cache.stages.embed import fill, threads_beside
from sam_cache.stages.encoding import Encoding, compile_encoder
from sam_cache.stages.progress import Bar, hushed
from sam_cache.store import EmbeddingStore, LevelSpec, StoreSpec

TARGET = 0.95
# Stored type, resize, and whether threads work beside the encoder where they would not by default.
CONTENDERS = {
    "fp16": ("fp16", "upstream", False),
    "int8": ("int8", "upstream", False),
    "fp16_fast": ("fp16", "fast", False),
    "fp16_beside": ("fp16", "upstream", True),
}
# Images in a round, so that a round takes seconds; and rounds.
ON_CPU = {"nano": (24, 3), "vit_b": (4, 3)}
ON_GPU = {"vit_b": (512, 5), "vit_l": (256, 3), "vit_h": (128, 3)}


def write_photographs(folder: Path, images: int, width: int, height: int) -> Dataset:
    """Scenes of this size as JPEG files; every eighth is another one, for decoding takes as long either way."""
    scenes = open_synthetic(min(images, 8), size=512)
    random = np.random.default_rng(0)
    for number in range(images):
        record = scenes.images[number % len(scenes.images)]
        if number < len(scenes.images):
            scene = cv2.resize(
                decode(scenes.read(record), record).image, (width, height), interpolation=cv2.INTER_CUBIC
            )
            grain = random.normal(0, 6, scene.shape)  # as a sensor has it: without it a JPEG is small and quick to read
            scene = np.clip(scene + grain, 0, 255).astype(np.uint8)[:, :, ::-1]
            data = cv2.imencode(".jpg", scene, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
            (folder / f"{number:05d}.jpg").write_bytes(data)
        else:
            (folder / f"{number:05d}.jpg").write_bytes((folder / f"{number % len(scenes.images):05d}.jpg").read_bytes())
    return open_images(folder)


def make_store(path: Path, encoder: Encoder, source: Dataset, how: Preprocessing, dtype: str) -> EmbeddingStore:
    levels = {name: LevelSpec(*shape, dtype) for name, shape in encoder.levels.items()}
    spec = StoreSpec(encoder.size.name, encoder.digest, levels, "fp32", vars(how))
    pairs = [(number, number) for number in range(len(source.images))]
    return EmbeddingStore.create_or_resume(
        path, spec, source.images, lambda records: object_columns(source, pairs), b"", {}, {"categories": []}
    )


def measure(model: str, source: Dataset, rounds: int, batch_size: int, threads: int, device: torch.device) -> dict:
    """Seconds of each contender for all images of `source`, and the shares."""
    encoder = make_encoder(model).to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    how = Preprocessing(encoder.size.input_size)
    if device.type == "cuda":
        compile_encoder(encoder, batch_size, device)
    numbered = [(number, number) for number in range(len(source.images))]
    pixels = [
        replace(batch, pixels=batch.pixels.to(device), content_hw=batch.content_hw.to(device))
        for batch in pixel_batches(source, numbered, how, batch_size, threads)
    ]

    def run_bare() -> None:
        encoding = Encoding(encoder, device, batch_size, set())
        for batch in pixels:
            encoding.encode(batch)

    chosen = {name: of for name, of in CONTENDERS.items() if not (of[2] and threads)}
    with tempfile.TemporaryDirectory() as folder:
        number = count()

        def embed(dtype: str, resize: str, beside: bool) -> None:
            with hushed(), Bar("", 0, "") as bar:
                store = stores[dtype, resize, beside].pop()
                asked = {row: (row, WHOLE) for row in range(len(source.images))}
                encoding = Encoding(encoder, device, batch_size, set(encoder.levels) if dtype == "int8" else set())
                workers = torch.multiprocessing.cpu_count() if beside else threads
                fill(store, store.uncommitted(), source, asked, replace(how, resize=resize), encoding, workers, bar)

        # Made beforehand: what it costs to make a store is no part of this.
        stores = {
            of: [
                make_store(Path(folder, f"{next(number)}.zarr"), encoder, source, replace(how, resize=of[1]), of[0])
                for _ in range(rounds + 1)
            ]
            for of in chosen.values()
        }
        contenders: dict[str, Callable[[], None]] = {"bare": run_bare}
        contenders |= {name: partial(embed, *of) for name, of in chosen.items()}
        seconds = alternate(contenders, rounds)
    return {
        "model": model,
        "images": len(source.images),
        "seconds": summarise(seconds),
        "share": {name: median_ratio(seconds, "bare", name) for name in chosen},
    }


def processor_ms(work: Callable[[], object], images: int) -> float:
    """Processor time for each of `images`, of all threads, in milliseconds."""
    work()
    started = time.process_time()
    work()
    return (time.process_time() - started) / images * 1000


def measure_parts(source: Dataset, device: torch.device) -> dict[str, float]:
    """What each part costs an image, in milliseconds of processor time, each by itself."""
    records = source.images[:8]
    size = SIZES["nano"]
    data = [source.read(record) for record in records]
    decoded = [decode(one, record).image for one, record in zip(data, records, strict=True)]

    def resize(how: str) -> None:
        for image in decoded:
            to_pixels(image, Geometry(*image.shape[:2], size.input_size), how)

    found = {
        "read the file": processor_ms(lambda: [source.read(record) for record in records], len(records)),
        "decode": processor_ms(lambda: [decode(*one) for one in zip(data, records, strict=True)], len(records)),
        "resize": processor_ms(lambda: resize("upstream"), len(records)),
        "resize, fast": processor_ms(lambda: resize("fast"), len(records)),
    }
    encoder, how = make_encoder("nano"), Preprocessing(size.input_size)
    levels = torch.randn(len(records), *encoder.levels["neck"])
    few = replace(source, images=records)
    for dtype in ("fp16", "int8"):
        with tempfile.TemporaryDirectory() as folder:
            stores = iter([make_store(Path(folder, name), encoder, few, how, dtype) for name in ("a.zarr", "b.zarr")])
            found[f"quantise, checksum, write {dtype}"] = processor_ms(partial(write, stores, levels), len(records))
    return found


def write(stores, levels: torch.Tensor) -> None:
    store = next(stores)
    for shard in store.uncommitted():
        with store.writing(shard) as writer:
            for row in shard.rows:
                writer.append(row, {"neck": levels[row]}, "0" * 64)


def render(result: dict) -> str:
    rows = []
    for case in result["cases"]:
        rates = {name: case["images"] / found["median_s"] for name, found in case["seconds"].items()}
        shares = [f"{rates[name]:.2f} ({share:.1%})" for name, share in case["share"].items()]
        rows.append([case["model"], case["size"], f"{rates['bare']:.2f}", *shares])
    head = ["model", "JPEG files", "bare encoder, images/s", "embed, fp16", "embed, int8", "fp16, `--resize fast`"]
    head += ["fp16, `--threads` beside the encoder"] if "fp16_beside" in result["cases"][0]["share"] else []
    parts = table(
        ["processor time of an image, ms", *result["parts_ms"]],
        [
            [name, *(f"{found[name]:.2f}" for found in result["parts_ms"].values())]
            for name in next(iter(result["parts_ms"].values()))
        ],
    )
    met = [f"{case['model']}, {case['size']}" for case in result["cases"] if case["share"]["fp16"] >= TARGET]
    missed = [f"{case['model']}, {case['size']}" for case in result["cases"] if case["share"]["fp16"] < TARGET]
    said = f"Stored as fp16, embedding reaches {TARGET:.0%} of the bare encoder's rate with {'; '.join(met) or 'none'}"
    return "\n\n".join([table(head, rows), said + (f"; not with {'; '.join(missed)}." if missed else "."), parts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SIZES))
    parser.add_argument("--sizes", nargs="+", default=["640x480", "3000x2000"])
    parser.add_argument("--images", type=int, help="instead of so many that a round takes seconds")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--batch-size", type=int, help="by default 1 on cpu, 16 on cuda")
    parser.add_argument("--threads", type=int, help="that decode; by default those of `samcache embed`")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    device = pick_device(options.device, Ranks())
    plan = ON_GPU if device.type == "cuda" else ON_CPU
    batch_size = options.batch_size or (16 if device.type == "cuda" else 1)
    threads = options.threads or threads_beside(device)
    cases, parts = [], {}
    for size in options.sizes:
        width, height = map(int, size.split("x"))
        for model in options.models or plan:
            if model == "vit_b" and device.type == "cpu" and size != options.sizes[0]:
                continue  # beside an encoder of seconds larger files are milliseconds
            images, rounds = plan.get(model, (4, 2))
            with tempfile.TemporaryDirectory() as folder:
                source = write_photographs(Path(folder), options.images or images, width, height)
                case = measure(model, source, options.rounds or rounds, batch_size, threads, device) | {"size": size}
                cases.append(case)
                shares = ", ".join(f"{name} {share:.1%}" for name, share in case["share"].items())
                bare = case["images"] / case["seconds"]["bare"]["median_s"]
                print(f"{model} from {size}: bare {bare:.2f} images/s; {shares}", flush=True)
                if size not in parts:
                    parts[size] = measure_parts(source, device)
    result = {
        "cases": cases,
        "ratios": {
            f"{case['model']}_{case['size']}_{name}": share for case in cases for name, share in case["share"].items()
        },
        "parts_ms": parts,
        "settings": vars(options) | {"batch_size": batch_size, "threads": threads},
        "machine": describe_machine(),
    }
    print(render(result))
    write_results(f"embedding_{device.type}", result)


if __name__ == "__main__":
    main()
