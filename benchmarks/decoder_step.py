"""How much faster the batched decoder trains than upstream's, image by image, and with how much memory.

    python benchmarks/decoder_step.py [--rounds 2] [--images 8] [--prompts 8] [--device cpu|cuda]

One step: forward, cross entropy and Dice, backward, for prompts of one point, of a box, and of a box with a mask of
their own. The decoder is of full size, with fixed-seed weights; fp32 on a CPU, bf16 autocast on a GPU. About three
minutes on two quiet cores. The contenders take turns in one process:

    upstream         segment_anything's own modules, one call per image, one backward at the end
    upstream_images  the same with a backward per image, the thriftiest that upstream can do
    maps             all prompts in one call, the loss on whole maps as upstream's
    points           all prompts in one call, the loss on `--points` cells of each map, which alone are decoded
    chunks           as `maps`, with a forward and a backward for every `--chunk` prompts

`*_vs_upstream` are upstream's seconds over ours, medians over rounds. `memory_*` are our bytes over upstream's, at the
moment when autograd keeps most for the backward pass, parameters aside. On a CPU all contenders run with freed memory
kept by the process (`sam_cache.stages.allocation`); without that all are slower, and upstream's loop most of all.
`differences` are those of masks and gradients from upstream's, both in fp32 on one image: the largest of a logit, in
units of the largest logit, and of all gradients together, in units of their norm.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from measure import alternate, describe_machine, median_ratio, summarise, table, write_results
from torch import Tensor

from sam_cache.model import Top, load_top
from sam_cache.stages.allocation import keep_freed_memory
from sam_cache.training import loss_cells
from sam_cache.types import Prompts

KINDS = {"point": "one point", "box": "box", "mask": "box and mask"}
NAMES = {
    "upstream": "upstream",
    "upstream_images": "upstream, a backward per image",
    "maps": "ours, whole maps",
    "points": "ours, {points:,} cells of each map",
    "chunks": "ours, whole maps, {chunk} prompts at a time",
}
TARGETS = {"maps": (1.5, 0.55), "points": (3.0, 0.3)}  # at least so fast, at most so much memory; CPU, one point
GPU_TARGET = 5.0


def draw_prompts(images: int, each: int, side: int, kind: str = "point", mask_side: int = 256) -> Prompts:
    total = images * each
    points = total if kind == "point" else 0
    return Prompts(
        image_index=torch.arange(images).repeat_interleave(each),
        kind=torch.zeros(total, dtype=torch.long),
        points_xy_input=torch.rand(points, 2) * side,
        labels=torch.ones(points, dtype=torch.long),
        offsets=torch.arange(total + 1) if points else torch.zeros(total + 1, dtype=torch.long),
        boxes_xyxy_input=torch.rand(total, 2, 2).sort(dim=1).values.flatten(1) * side,
        has_box=torch.full((total,), kind != "point"),
        has_mask=torch.full((total,), kind == "mask"),
        chance=torch.rand(total, 2),
        masks=3 * torch.randn(total, mask_side, mask_side) if kind == "mask" else None,
    )


def mask_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Of P masks, summed over them; cells may be of a whole map or not."""
    logits, targets = logits.float().flatten(1), targets.flatten(1)
    soft = logits.sigmoid()
    overlap, total = (soft * targets).sum(1), soft.sum(1) + targets.sum(1)
    dice = 1 - (2 * overlap + 1) / (total + 1)
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1).sum() + dice.sum()


def decode_upstream(top: Top, neck: Tensor, prompts: Prompts, image: int) -> Tensor:
    mine = prompts.select((prompts.image_index == image).nonzero()[:, 0])
    points = (mine.points_xy_input[:, None], mine.labels[:, None]) if len(mine.labels) else None
    sparse, dense = top.prompt_encoder(
        points=points,
        boxes=mine.boxes_xyxy_input if mine.has_box[0] else None,
        masks=None if mine.masks is None else mine.masks[:, None],
    )
    masks, _ = top.mask_decoder(
        image_embeddings=neck[image : image + 1],
        image_pe=top.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=False,
    )
    return masks[:, 0]


class Steps:
    """One step of every contender, on the same images, prompts and targets."""

    def __init__(self, top: Top, kind: str, options: argparse.Namespace, device: torch.device):
        size, self.top = top.size, top
        drawn = draw_prompts(options.images, options.prompts, size.input_size, kind, size.mask_size)
        shape = options.images, size.neck_channels, size.grid, size.grid
        self.neck, self.prompts = torch.randn(shape, device=device), drawn.to(device)
        self.targets = (torch.rand(len(drawn), size.mask_size, size.mask_size, device=device) > 0.5).float()
        self.cells = loss_cells(self.prompts.chance, options.points, size.mask_size)
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=device.type == "cuda")
        self.chunk = options.chunk

    def upstream(self) -> None:
        with self.autocast():
            logits = [decode_upstream(self.top, self.neck, self.prompts, image) for image in range(len(self.neck))]
        mask_loss(torch.cat(logits), self.targets).backward()

    def upstream_images(self) -> None:
        for image in range(len(self.neck)):
            with self.autocast():
                logits = decode_upstream(self.top, self.neck, self.prompts, image)
            mask_loss(logits, self.targets[self.prompts.image_index == image]).backward()

    def maps(self) -> None:
        self._step(self.neck, self.prompts, self.targets)

    def points(self) -> None:
        self._step(self.neck, self.prompts, self.targets.flatten(1).gather(1, self.cells), self.cells)

    def chunks(self) -> None:
        for index in torch.arange(len(self.prompts), device=self.neck.device).split(self.chunk):
            part = self.prompts.select(index)
            first, last = int(part.image_index.min()), int(part.image_index.max())
            part.image_index.sub_(first)
            self._step(self.neck[first : last + 1], part, self.targets[index])

    def _step(self, neck: Tensor, prompts: Prompts, targets: Tensor, cells: Tensor | None = None) -> None:
        with self.autocast():
            logits = self.top({"neck": neck}, prompts, False, cells).logits
        mask_loss(logits, targets).backward()


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


def find_differences(top: Top, kind: str, device: torch.device) -> dict[str, float]:
    """Of our masks and gradients from upstream's, in fp32: two prompts on one image."""
    size = top.size
    prompts = draw_prompts(1, 2, size.input_size, kind, size.mask_size).to(device)
    neck = torch.randn(1, size.neck_channels, size.grid, size.grid, device=device)
    weight = torch.randn(2, size.mask_size, size.mask_size, device=device)
    masks, gradients = [], []
    for logits in (decode_upstream(top, neck, prompts, 0), top({"neck": neck}, prompts, False).logits[:, 0]):
        top.zero_grad()
        (logits * weight).sum().backward()
        masks.append(logits.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in top.parameters() if p.grad is not None]))
    top.zero_grad()
    return {
        "masks": float((masks[1] - masks[0]).abs().max() / masks[0].abs().max()),
        "gradients": float((gradients[1] - gradients[0]).norm() / gradients[0].norm()),
    }


def measure_kind(top: Top, kind: str, options: argparse.Namespace, device: torch.device) -> dict:
    steps, kept = Steps(top, kind, options, device), {}
    names = ["upstream", "maps", "points"] + (["upstream_images", "chunks"] if kind == "point" else [])

    def take(name: str) -> None:
        top.zero_grad()
        step = getattr(steps, name)
        if name in kept:
            step()
        else:  # the round that is thrown away
            kept[name] = kept_bytes(step, top)

    seconds = alternate({name: partial(take, name) for name in names}, options.rounds)
    ours = [name for name in names if "upstream" not in name]
    ratios = {f"{name}_vs_upstream": median_ratio(seconds, "upstream", name) for name in ours}
    ratios |= {f"memory_{name}": kept[name] / kept["upstream"] for name in ours}
    return {
        "ratios": ratios,
        "seconds": summarise(seconds),
        "kept_mib": {name: count / 2**20 for name, count in kept.items()},
        "differences": find_differences(top, kind, device),
    }


def render(result: dict) -> str:
    step, kinds, cuda = result["step"], result["kinds"], result["step"]["device"] == "cuda"
    rows = []
    for kind, found in kinds.items():
        for name, seconds in found["seconds"].items():
            faster = found["ratios"].get(f"{name}_vs_upstream")
            rows.append([
                KINDS[kind] if name == "upstream" else "",
                NAMES[name].format(**step),
                f"{seconds['median_s']:.{4 if cuda else 2}f}",
                f"**{faster:.1f}x**" if faster else "",
                f"{found['kept_mib'][name]:,.0f}",
                f"{found['kept_mib'][name] / found['kept_mib']['upstream']:.2f}",
            ])  # fmt: skip
    head = ["prompts", "contender", "s a step", "faster than upstream", "MiB kept for backward", "of upstream's"]
    ratios = result["ratios"]
    numbers = {name: (ratios[f"{name}_vs_upstream"], ratios[f"memory_{name}"]) for name in TARGETS}
    if cuda:
        goals = f"the target was {GPU_TARGET:g}x"
    else:
        goals = "the targets were " + " and ".join(f"{fast:g}x with {most:g}" for fast, most in TARGETS.values())
    said = "; ".join(f"{name}: {fast:.1f}x with {most:.2f} of the memory" for name, (fast, most) in numbers.items())
    far = {name: max(found["differences"][name] for found in kinds.values()) for name in ("masks", "gradients")}
    return (
        f"{step['images']} images x {step['prompts']} prompts, full size, {'bf16' if cuda else 'fp32'}, the loss on "
        f"whole maps or on {step['points']:,} of their cells; medians of {step['rounds']} rounds in turn.\n\n"
        f"{table(head, rows)}\n\n{said} (one point; {goals}). In fp32, masks are within {far['masks']:.0e} of "
        f"upstream's and gradients within {far['gradients']:.0e}."
    )


def measure(options: argparse.Namespace) -> dict:
    torch.manual_seed(0)
    device = torch.device(options.device)
    top = load_top(options.model).to(device)
    kinds = {}
    for kind in KINDS:
        kinds[kind] = measure_kind(top, kind, options, device)
        told = ", ".join(f"{name} {ratio:.2f}" for name, ratio in kinds[kind]["ratios"].items())
        print(f"{KINDS[kind]}: {told}", flush=True)
    ratios = dict(kinds["point"]["ratios"])
    for kind in ("box", "mask"):
        ratios |= {f"{kind}_{name}": ratio for name, ratio in kinds[kind]["ratios"].items()}
    return {"ratios": ratios, "kinds": kinds, "step": vars(options), "machine": describe_machine()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="default: 2, on a GPU 20")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=8, help="of each image")
    parser.add_argument("--points", type=int, default=1024, help="cells of each map")
    parser.add_argument("--chunk", type=int, default=16, help="prompts")
    parser.add_argument("--model", default="nano", help="its top is as large as that of every released SAM")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    options.rounds = options.rounds or (20 if options.device == "cuda" else 2)
    if options.device == "cpu":
        keep_freed_memory()
    result = measure(options)
    print(render(result))
    write_results(f"decoder_{options.device}", result)


if __name__ == "__main__":
    main()
