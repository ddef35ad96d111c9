"""How much faster the batched decoder trains than upstream's, image by image.

    python benchmarks/decoder_step.py [--rounds 5] [--images 8] [--prompts 8] [--device cpu|cuda]

One step: forward, cross-entropy and dice at the decoder's resolution, backward; full-size decoder,
one point per prompt, fp32, fixed-seed weights. The contenders take turns in one process, so that
other load on the machine hits them alike: trust the ratios, not the seconds.

    upstream         one call per image, one backward at the end
    upstream_images  one call and one backward per image, the thriftiest upstream can do
    batched          all prompts in one call
    chunks           the batched decoder and a backward for every `--chunk` prompts

Ratios are upstream's over ours; `processor_*` of processor time, which other load hardly touches,
`memory_*` of the most bytes that autograd keeps for the backward pass at a time.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from measure import alternate, describe_machine, median_ratio, summarise, write_results
from torch import Tensor

from sam_cache.model import Top, load_top
from sam_cache.types import Prompts


def draw_prompts(images: int, each: int, side: int) -> Prompts:
    total = images * each
    return Prompts(
        image_index=torch.arange(images).repeat_interleave(each),
        kind=torch.zeros(total, dtype=torch.long),
        points_xy_input=torch.rand(total, 2) * side,
        labels=torch.ones(total, dtype=torch.long),
        offsets=torch.arange(total + 1),
        boxes_xyxy_input=torch.zeros(total, 4),
        has_box=torch.zeros(total, dtype=torch.bool),
        has_mask=torch.zeros(total, dtype=torch.bool),
        chance=torch.zeros(total, 2),
    )


def mask_loss(logits: Tensor, targets: Tensor) -> Tensor:
    soft = logits.sigmoid()
    overlap, total = (soft * targets).sum((1, 2)), soft.sum((1, 2)) + targets.sum((1, 2))
    dice = 1 - (2 * overlap + 1) / (total + 1)
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean((1, 2)).sum() + dice.sum()


def decode_upstream(top: Top, neck: Tensor, prompts: Prompts, image: int) -> Tensor:
    mine = prompts.select((prompts.image_index == image).nonzero()[:, 0])
    points = mine.points_xy_input[:, None], mine.labels[:, None]
    sparse, dense = top.prompt_encoder(points=points, boxes=None, masks=None)
    masks, _ = top.mask_decoder(
        image_embeddings=neck[image : image + 1],
        image_pe=top.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=False,
    )
    return masks[:, 0]


def step_upstream(top: Top, neck: Tensor, prompts: Prompts, targets: Tensor) -> None:
    logits = [decode_upstream(top, neck, prompts, image) for image in range(len(neck))]
    mask_loss(torch.cat(logits), targets).backward()


def step_upstream_images(top: Top, neck: Tensor, prompts: Prompts, targets: Tensor) -> None:
    for image in range(len(neck)):
        mask_loss(decode_upstream(top, neck, prompts, image), targets[prompts.image_index == image]).backward()


def step_chunks(top: Top, neck: Tensor, prompts: Prompts, targets: Tensor, chunk: int) -> None:
    for index in torch.arange(len(prompts), device=neck.device).split(chunk):
        part = prompts.select(index)
        first, last = int(part.image_index.min()), int(part.image_index.max())
        part.image_index.sub_(first)
        logits = top({"neck": neck[first : last + 1]}, part, multimask=False).logits[:, 0]
        mask_loss(logits, targets[index]).backward()


def kept_bytes(step: Callable[[], None], top: Top) -> int:
    """The most bytes that autograd keeps at a time, parameters aside."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in top.parameters()}
    alive: dict[int, list[int]] = {}
    most = 0

    class Kept:
        def __init__(self, tensor: Tensor):
            nonlocal most
            self.tensor, self.key = tensor, tensor.untyped_storage().data_ptr()
            if self.key not in parameters:
                alive.setdefault(self.key, [0, tensor.untyped_storage().nbytes()])[0] += 1
                most = max(most, sum(size for _, size in alive.values()))

        def __del__(self):
            if self.key in alive:
                alive[self.key][0] -= 1
                if alive[self.key][0] == 0:
                    del alive[self.key]

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        step()
    return most


def note_processor_time(step: Callable[[], None], top: Top, notes: list[float]) -> None:
    top.zero_grad()
    start = time.process_time()
    step()
    notes.append(time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--chunk", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    torch.manual_seed(0)
    device = torch.device(options.device)
    top = load_top("nano").to(device)  # as large as the top of every released SAM
    size = top.size
    neck = torch.randn(options.images, size.neck_channels, size.grid, size.grid, device=device)
    prompts = draw_prompts(options.images, options.prompts, size.input_size).to(device)
    targets = (torch.rand(len(prompts), size.mask_size, size.mask_size, device=device) > 0.5).float()
    data = top, neck, prompts, targets
    steps = {
        "upstream": partial(step_upstream, *data),
        "upstream_images": partial(step_upstream_images, *data),
        "batched": partial(step_chunks, *data, chunk=len(prompts)),
        "chunks": partial(step_chunks, *data, chunk=options.chunk),
    }
    notes: dict[str, list[float]] = {name: [] for name in steps}
    seconds = alternate(
        {name: partial(note_processor_time, step, top, notes[name]) for name, step in steps.items()},
        options.rounds,
    )
    processor = {name: statistics.median(times[1:]) for name, times in notes.items()}
    kept = {name: kept_bytes(step, top) for name, step in steps.items()}
    ratios = {
        "maps_vs_upstream": median_ratio(seconds, "upstream", "batched"),
        "maps_chunks_vs_upstream_images": median_ratio(seconds, "upstream_images", "chunks"),
        "processor_maps_vs_upstream": processor["upstream"] / processor["batched"],
        "processor_chunks_vs_upstream_images": processor["upstream_images"] / processor["chunks"],
        "memory_maps": kept["upstream"] / kept["batched"],
        "memory_chunks_vs_upstream": kept["upstream"] / kept["chunks"],
    }
    for name, ratio in ratios.items():
        print(f"{name:36} {ratio:5.2f}")
    write_results(
        f"decoder_{device.type}",
        {
            "ratios": ratios,
            "seconds": summarise(seconds),
            "processor_seconds": processor,
            "kept_mib": {name: value / 2**20 for name, value in kept.items()},
            "step": vars(options),
            "machine": describe_machine(),
        },
    )


if __name__ == "__main__":
    main()
