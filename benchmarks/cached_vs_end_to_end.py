"""How much faster is a training step from the cache than the same step with the live encoder?

    python benchmarks/cached_vs_end_to_end.py --model vit_b --prompts 8 --images 2 --rounds 3

Three contenders take the same images, prompts, targets, losses and optimizer, alternately in one process:

- `cached` reads the rows from a store on disk (page cache warm) and trains the top;
- `live` runs the frozen encoder first and then takes the very same step;
- `upstream` is what a user would write: segment_anything's encoder, and its decoder image by image.

Pixels are decoded beforehand for `live` and `upstream`; `cached` pays for its reading. Weights are
random, which does not change the time. Beside the ratio stands its bound: the floating-point operations
of encoder and step over those of the step, counted by torch.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from measure import alternate, describe_machine, median_ratio, summarise, write_results
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from sam_cache.batches import CachedBatches, Order, Sampling, pixel_batches
from sam_cache.config import EmbedConfig
from sam_cache.data import parse_prompts
from sam_cache.model import SIZES, Masks, Top, load_encoder, top_from_bytes
from sam_cache.model.encoder import normalise_pixels
from sam_cache.model.parts import build_image_encoder
from sam_cache.model.weights import fixed_weights
from sam_cache.stages.cached_data import CachedData
from sam_cache.stages.decoding import SamObjective
from sam_cache.stages.embed import embed
from sam_cache.stages.source import open_source
from sam_cache.training import LossWeights
from sam_cache.types import Batch


def main() -> None:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, cfg = make_store(arguments, Path(folder))
        data = CachedData.open(cfg.store, annotations=None, partial=False, held_out=0.0, seed=0)
        contenders, flops = make_contenders(arguments, data, cfg, checkpoint, device)
        seconds = alternate(contenders, arguments.rounds)
    live, upstream = (median_ratio(seconds, name, "cached") for name in ("live", "upstream"))
    bound = (flops["encoder"] + flops["step"]) / flops["step"]
    print(f"{arguments.model} on {device}, {arguments.images} images x {arguments.prompts} prompts, fp32")
    for name, found in summarise(seconds).items():
        rate = arguments.images / found["median_s"]
        print(f"  {name:9} {found['median_s']:8.2f} s a step, {rate:7.3f} images/s")
    print(f"  cached is {live:.1f}x live, {upstream:.1f}x upstream; operations would allow {bound:.1f}x")
    write_results(
        f"cached_vs_end_to_end_{arguments.model}_{device.type}",
        {
            "settings": vars(arguments),
            "seconds": summarise(seconds),
            "flops_per_image": {name: count / arguments.images for name, count in flops.items()},
            "ratios": {"cached_vs_live": live, "cached_vs_upstream": upstream, "bound_vs_live": bound},
            "machine": describe_machine(),
        },
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[name for name in SIZES], default="vit_b")
    parser.add_argument("--prompts", type=int, default=8, help="prompts per image")
    parser.add_argument("--images", type=int, default=2, help="images per step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    return parser.parse_args()


def make_store(arguments: argparse.Namespace, folder: Path) -> tuple[Path | None, EmbedConfig]:
    checkpoint = None
    if SIZES[arguments.model].checkpoint:
        checkpoint = folder / "random.safetensors"
        save_file(fixed_weights(SIZES[arguments.model]), checkpoint)
    cfg = EmbedConfig(
        dataset="synthetic",
        scenes=arguments.images,
        model=arguments.model,
        checkpoint=checkpoint,
        store=folder / "scenes.zarr",
        device=arguments.device,
        compute_dtype="fp32",
    )
    embed(cfg)
    return checkpoint, cfg


def make_contenders(arguments, data: CachedData, cfg: EmbedConfig, checkpoint: Path | None, device: torch.device):
    """The three steps, and the operations of the encoder and of one step."""
    encoder = load_encoder(arguments.model, checkpoint).to(device)
    sampling = Sampling(parse_prompts("box"), 0, training=True)
    top = top_from_bytes(data.store.base).to(device)
    annotator = data.annotator(top.size.mask_size, sampling)
    batches = iter(CachedBatches(data.store, annotator, Order(data.train, seed=0), batch_size=arguments.images))
    dataset, how = open_source(cfg), data.preprocessing
    rows = [(number, number) for number in range(arguments.images)]
    pixels = next(pixel_batches(dataset, rows, how, arguments.images, threads=1))
    optimizer = torch.optim.AdamW(top.parameters(), lr=1e-5)
    objective = SamObjective(LossWeights())

    def step(batch: Batch) -> None:
        next(objective(top, batch))["loss"].div(len(batch.prompts)).backward()
        optimizer.step()
        optimizer.zero_grad()

    def draw() -> Batch:
        batch = next(batches).to(device)
        return batch.select(even(batch.prompts.image_index, arguments.prompts))

    @torch.no_grad()
    def encode() -> dict[str, torch.Tensor]:
        return encoder(pixels.pixels.to(device), pixels.content_hw.to(device))

    def live() -> None:
        batch = draw()
        batch.levels.update(encode())
        step(batch)

    upstream = UpstreamTop(top)

    def end_to_end() -> None:
        batch = draw()
        with torch.no_grad():
            inputs = normalise_pixels(pixels.pixels.to(device), pixels.content_hw.to(device), "sam")
            neck = encoder.vit(inputs)
        for image in range(arguments.images):
            one = batch.select((batch.prompts.image_index == image).nonzero()[:, 0])
            one.levels["neck"] = neck[image : image + 1]
            next(objective(upstream, one))["loss"].div(len(batch.prompts)).backward()
        optimizer.step()
        optimizer.zero_grad()

    with torch.device("meta"):  # the published encoder's operations, whatever ours restates
        published = build_image_encoder(top.size)
        meta_pixels = torch.empty(arguments.images, 3, top.size.input_size, top.size.input_size)
    flops = {
        "encoder": count(lambda: published(meta_pixels)),
        "step": count(lambda batch=draw(): step(batch)),
    }
    return {"cached": lambda: step(draw()), "live": live, "upstream": end_to_end}, flops


class UpstreamTop(torch.nn.Module):
    """segment_anything's own modules, called as its users do: one image, its prompts in a batch."""

    def __init__(self, top: Top):
        super().__init__()
        self.prompt_encoder, self.mask_decoder = top.prompt_encoder, top.mask_decoder

    def forward(self, levels, prompts, multimask: bool) -> Masks:
        sparse, dense = self.prompt_encoder(points=None, boxes=prompts.boxes_xyxy_input, masks=None)
        position = self.prompt_encoder.get_dense_pe()
        return Masks(*self.mask_decoder(levels["neck"].to(sparse.dtype), position, sparse, dense, multimask))


def even(image_index: torch.Tensor, count: int) -> torch.Tensor:
    """`count` prompts of every image, some of them twice where an image has fewer."""
    per_image = [(image_index == image).nonzero()[:, 0] for image in image_index.unique()]
    return torch.cat([own.repeat(-(-count // len(own)))[:count] for own in per_image])


def count(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
