"""How much memory should a step of `samcache train-full` take, by `sam_cache.model.estimate_memory`?

    python benchmarks/memory_plan.py

A plan, and no measurement: bf16, 64 prompts decoded at once, whole networks or SAM-Adapter, with and without activation
checkpointing. Every run prints the estimate beside the peak it had.
"""

import argparse
from itertools import product

import torch
from measure import describe_machine, table, write_results

from sam_cache.model import Sam, SamAdapterKnobs, attach, estimate_memory, freeze, size_of
from sam_cache.model.parts import outline

TRAINED = {"none": {"encoder", "neck", "prompt", "decoder"}, "sa": {"adapter", "no-mask", "decoder"}}


def make_network(model: str, adapter: str) -> Sam:
    """Its shapes are what counts, so its weights are zeros."""
    size = size_of(model)
    sam = Sam(size, {key: torch.zeros(tensor.shape) for key, tensor in outline(size).state_dict().items()})
    if adapter == "sa":
        attach(sam.image_encoder, SamAdapterKnobs(), seed=0)
    freeze(sam, TRAINED[adapter])
    return sam


def render(result: dict) -> str:
    what = {"none": "`--adapter none`, every weight", "sa": "`--adapter sa`"}
    rows = [
        [plan["model"], what[plan["adapter"]], *(f"{count / 2**30:.1f} GiB" for count in plan["bytes"].values())]
        for plan in result["plans"]
    ]
    return table(["model", "", "with activation checkpointing", "without"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=64)
    arguments = parser.parse_args()
    plans = []
    for model, adapter in product(("vit_b", "vit_l", "vit_h"), TRAINED):
        sam = make_network(model, adapter)
        by_checkpointing = {
            name: estimate_memory(sam, arguments.images, arguments.prompts, "bf16", checkpointing)
            for name, checkpointing in (("checkpointing", True), ("without", False))
        }
        plans.append({"model": model, "adapter": adapter, "bytes": by_checkpointing})
    result = {"settings": vars(arguments), "plans": plans, "machine": describe_machine()}
    print(render(result))
    write_results("memory_plan", result)


if __name__ == "__main__":
    main()
