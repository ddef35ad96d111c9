"""The contenders of cached_vs_end_to_end.py: encoders, steps from a store and from memory, upstream's."""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from measure import Seconds
from torch.utils.flop_counter import FlopCounterMode

from sam_cache.batches import CachedBatches, Order, Preprocessing, Sampling, pixel_batches
from sam_cache.config import EmbedConfig, TrainTopConfig
from sam_cache.data import mask_to_rle, measure_rle, parse_prompts
from sam_cache.data.dataset import Dataset
from sam_cache.data.synthetic import open_synthetic, place_things
from sam_cache.model import SIZES, Encoder, Masks, Top, fixed_weights, freeze, top_from_bytes
from sam_cache.model.encoder import normalise_pixels
from sam_cache.model.parts import build_image_encoder, part_of
from sam_cache.model.products import BY_ONEDNN
from sam_cache.stages.cached_data import CachedData
from sam_cache.stages.decoding import SamObjective
from sam_cache.stages.device import pick_mask_budget
from sam_cache.stages.embed import embed
from sam_cache.stages.schedule import make_optimizer
from sam_cache.training import LossWeights, Pace
from sam_cache.training.fit import backpropagate
from sam_cache.types import Batch, ObjectRecord

LOSSES = {"maps": "focal-dice", "points": "points"}


def make_scenes(images: int, objects: int) -> Dataset:
    """Synthetic scenes of `objects` objects each, all those of several scenes on one."""
    scenes = open_synthetic(images)

    def convert(number: int) -> tuple[list[ObjectRecord], list[str]]:
        found: list[ObjectRecord] = []
        shape = scenes.images[number].height, scenes.images[number].width
        seed = 0
        while len(found) < objects:
            things, owner = place_things(seed, number, shape)
            for index, thing in enumerate(things):
                rle = mask_to_rle(owner == index)
                found.append(ObjectRecord(len(found), thing.category, rle, *measure_rle(rle, *shape)))
            seed += 1
        return found[:objects], []

    return replace(scenes, convert=convert, notes=[])


class Trainer:
    """What a training stage does with a batch: chunks, losses, backward, clipping, AdamW."""

    def __init__(self, top: Top, device: torch.device):
        cfg, cuda = TrainTopConfig(), device.type == "cuda"
        freeze(top, {"prompt", "decoder"})
        self.top, self.upstream_top = top, UpstreamTop(top)
        self.accelerator = Accelerator(cpu=not cuda, mixed_precision="bf16" if cuda else "no")
        self.optimizer, _ = make_optimizer(cfg, top, steps=1)
        self.pace = Pace(1, 1, 1, mask_budget=pick_mask_budget(None, device))
        self.objectives = {name: SamObjective(LossWeights.of(kind), kind) for name, kind in LOSSES.items()}

    def step(self, batch: Batch, loss: str) -> None:
        divisor = float(batch.targets.weights.sum())
        for _ in backpropagate(self.top, batch, self.objectives[loss], self.accelerator, divisor, self.pace):
            pass
        self._update()

    def step_upstream(self, batch: Batch) -> None:
        """Image by image, whole maps."""
        for image in range(len(batch.rows)):
            one = batch.select((batch.prompts.image_index == image).nonzero()[:, 0])
            with self.accelerator.autocast():
                losses = next(self.objectives["maps"](self.upstream_top, one))
            losses["loss"].div(float(batch.targets.weights.sum())).backward()
        self._update()

    def _update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.top.parameters(), self.pace.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


class UpstreamTop(torch.nn.Module):
    """segment_anything's own modules, called as its users do: one image, its prompts in a batch."""

    def __init__(self, top: Top):
        super().__init__()
        self.prompt_encoder, self.mask_decoder = top.prompt_encoder, top.mask_decoder

    def forward(self, levels, prompts, multimask: bool) -> Masks:
        sparse, dense = self.prompt_encoder(points=None, boxes=prompts.boxes_xyxy_input, masks=None)
        position = self.prompt_encoder.get_dense_pe()
        return Masks(*self.mask_decoder(levels["neck"].to(sparse.dtype), position, sparse, dense, multimask))


class Contenders:
    """What takes turns, by name; the operations of each part for one image; and how many `steps` a turn has."""

    def __init__(self, folder: Path, options: argparse.Namespace):
        self.options, self.device = options, torch.device(options.device)
        scenes = make_scenes(options.rows, max(options.prompts))
        cfg = EmbedConfig(
            model=options.store_model, store=folder / "scenes.zarr", device=options.device, compute_dtype="fp32"
        )
        embed(cfg, scenes)
        self.data = CachedData.open(cfg.store, annotations=None, partial=False, held_out=0.0, seed=0)
        top = top_from_bytes(self.data.store.base).to(self.device)
        self.trainer = Trainer(top, self.device)
        how = Preprocessing(top.size.input_size)
        rows = [(number, number) for number in range(options.images)]
        found = next(pixel_batches(scenes, rows, how, options.images, threads=1))
        self.pixels, self.content = found.pixels.to(self.device), found.content_hw.to(self.device)
        self.turns: dict[str, Callable[[], object]] = {}
        self.gigaflops: dict[str, float] = {}
        self.steps: dict[str, int] = {}
        for model in options.models:
            self._add_encoders(model)
        for count in options.prompts:
            self._add_steps(count)

    def _add_encoders(self, model: str) -> None:
        size = SIZES[model]
        encoder = Encoder(size, part_of(fixed_weights(size), "image_encoder")).to(self.device)
        first = {"encoder": True, "upstream encoder": True}

        @torch.no_grad()
        def encode(which: str) -> None:
            # Of a large size one call more, in the round that is thrown away, would cost minutes and tell nothing.
            if first.pop(which, False) and self.device.type == "cpu" and model in ("vit_l", "vit_h"):
                return
            with self.trainer.accelerator.autocast():
                if which == "encoder":
                    encoder(self.pixels, self.content)
                else:
                    encoder.vit(normalise_pixels(self.pixels, self.content, "sam"))

        for which in ("encoder", "upstream encoder"):
            self.turns[f"{which} {model}"] = partial(encode, which)
        with torch.device("meta"):  # the published encoder's operations, whatever ours restates
            published, pixels = build_image_encoder(size), torch.empty(1, 3, size.input_size, size.input_size)
        self.gigaflops[f"encoder {model}"] = count_gigaflops(lambda: published(pixels))

    def _add_steps(self, count: int) -> None:
        batches = self._read(count)
        batch = copy(next(batches).to(self.device))
        if len(batch.prompts) != count * self.options.images:
            raise ValueError(f"{len(batch.prompts)} prompts were drawn where {count} an image were asked for")
        trainer = self.trainer
        # No fewer, or a queue full of batches would last for a whole turn.
        steps = self.options.steps * max(1, min(4, 8 // count))

        def from_memory(loss: str) -> None:
            for _ in range(steps):
                trainer.step(batch, loss)

        def from_store(loss: str) -> None:
            for _ in range(steps):
                trainer.step(next(batches).to(self.device), loss)

        for loss in LOSSES:
            self.turns[f"memory {count} {loss}"] = partial(from_memory, loss)
            self.turns[f"cached {count} {loss}"] = partial(from_store, loss)
            self.steps |= dict.fromkeys((f"memory {count} {loss}", f"cached {count} {loss}"), steps)
            # A backward pass takes twice the operations of its forward; what it makes again is not counted.
            forward = count_gigaflops(lambda loss=loss: next(trainer.objectives[loss](trainer.top, batch)))
            self.gigaflops[f"step {count} {loss}"] = 3 * forward / self.options.images
        self.turns[f"upstream {count}"] = partial(trainer.step_upstream, batch)

    def of_one(self, seconds: Seconds) -> Seconds:
        """Those of one step, from those of a turn."""
        return {name: [time / self.steps.get(name, 1) for time in times] for name, times in seconds.items()}

    def _read(self, count: int) -> Iterator[Batch]:
        sampling = Sampling(parse_prompts("box"), 0, training=True, max_objects=count)
        annotator = self.data.annotator(self.trainer.top.size.mask_size, sampling)
        order, pin = Order(self.data.train, seed=0), self.device.type == "cuda"
        return iter(CachedBatches(self.data.store, annotator, order, batch_size=self.options.images, pin=pin))


def copy(batch: Batch) -> Batch:
    """The batch in memory of its own: what a reader gives is written over later."""
    targets = replace(batch.targets, masks=batch.targets.masks.clone(), valid=batch.targets.valid.clone())
    return replace(batch, levels={name: level.clone() for name, level in batch.levels.items()}, targets=targets)


def count_gigaflops(function: Callable[[], object]) -> float:
    ours = {torch.ops.mkldnn._linear_pointwise: count_linear} if BY_ONEDNN else {}
    with FlopCounterMode(display=False, custom_mapping=ours) as counter:
        function()
    return counter.get_total_flops() / 1e9


def count_linear(rows: torch.Size, weight: torch.Size, *others: object, out_shape: torch.Size, **named: object) -> int:
    """Of oneDNN's linear layers, of which torch's counter does not know."""
    return 2 * rows.numel() * weight[0]
