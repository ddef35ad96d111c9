"""How fast is the image encoder, beside the published one and beside what the machine could do?

    python benchmarks/encoder.py [--models vit_b vit_l] [--rounds 3]
    python benchmarks/encoder.py --device cuda [--segment-anything-fast CHECKOUT]

1024x1024 images, random weights, which do not change the time, the same for all. Contenders take turns in one
process. On a CPU, in fp32, an image at a time:

    published       segment_anything's encoder
    channels        ours as it runs where gradients are wanted: fused attention, positions as channels of q and k
    without_onednn  ours, band by band, with the products of `F.linear`
    ours            ours, as `embed` runs it

On a GPU, each at the batch size that is its best out of `--batches`, but `published` at 1:

    published        segment_anything's encoder in fp32, with PyTorch's settings, an image at a time
    published_bf16   the same in bf16
    fast             segment-anything-fast in bf16, compiled by itself with max-autotune, from `--segment-anything-fast`
    not_compiled     ours in bf16
    channels         ours, compiled, positions as channels of q and k
    kernel           ours, compiled, positions added in the kernel of global attention
    autotuned        that, with torch.compile's max-autotune

`embed` takes `kernel`. Beside the times stands how far each contender's result is from `published`'s, and the share of
the machine's rate of products: the published encoder's operations (972, 2986 and 5961 GFLOP an image) times images/s,
over the rate of one large product, the best of the libraries at hand. On two cores: about six minutes; `vit_h` has to
be asked for there, and takes as long again.
"""

import argparse
import gc
import statistics
import time
from pathlib import Path

import torch
from encoder_contenders import OURS, Encode, contenders_on_cpu, makers_on_gpu
from measure import Seconds, alternate, describe_machine, median_ratio, summarise, table, write_results
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sam_cache.model import SIZES, products
from sam_cache.model.parts import build_image_encoder
from sam_cache.stages.allocation import keep_freed_memory

ROUNDS_ON_CPU = {"vit_b": 3, "vit_l": 1}
TARGETS = {"cpu": {"ours_vs_published": 1.2}, "cuda": {"ours_vs_published": 8, "ours_vs_fast": 1.3}}
SHARES = {"vit_b": 0.45, "vit_l": 0.6, "vit_h": 0.6}  # of the rate of products, on a GPU
BOUNDS = {"cpu": 1e-4, "cuda": 3e-2}  # relative distances from the published encoder: fp32 sums, bf16 values


def draw_images(images: int, device: str, side: int) -> Tensor:
    """Coarse fields with grain: an image of noise alone would leave attention nothing to find."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(images, 3, side // 32, side // 32, generator=generator)
    fields = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear") * 220
    return (fields + 35 * torch.rand(fields.shape, generator=generator)).byte().to(device)


def product_rates(device: str) -> dict[str, float]:
    """GFLOP/s of one large product, the median of some, by each library that makes such products here."""
    side, dtype = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    makers = {"F.linear": lambda: torch.nn.functional.linear(left, right)}
    if device == "cpu" and products.BY_ONEDNN:
        makers["oneDNN"] = lambda: products.multiply(left, right)
    seconds = alternate(makers, 20)
    return {name: 2 * side**3 / statistics.median(times) / 1e9 for name, times in seconds.items()}


def count_gflop(model: str) -> float:
    """Of the published encoder, for an image."""
    size = SIZES[model]
    with torch.device("meta"):
        vit, pixels = build_image_encoder(size), torch.empty(1, 3, size.input_size, size.input_size)
    with FlopCounterMode(display=False) as counter:
        vit(pixels)
    return counter.get_total_flops() / 1e9


def distance(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over norm."""
    return ((found.float() - expected).norm() / expected.norm()).item()


@torch.inference_mode()
def measure_on_cpu(model: str, rounds: int) -> dict:
    contenders = contenders_on_cpu(model)
    pixels = draw_images(1, "cpu", SIZES[model].input_size)
    expected = contenders["published"](pixels)
    distances = {name: distance(encode(pixels), expected) for name, encode in contenders.items()}
    used: dict[str, list[float]] = {name: [] for name in contenders}

    def note_processor_time(name: str) -> None:
        started = time.process_time()
        contenders[name](pixels)
        used[name].append(time.process_time() - started)

    seconds = alternate({name: lambda name=name: note_processor_time(name) for name in contenders}, rounds)
    case = describe_case(model, seconds, dict.fromkeys(seconds, 1), distances)
    return case | {"processor_s": {name: statistics.median(times[1:]) for name, times in used.items()}}


def describe_case(model: str, seconds: Seconds, images: dict[str, int], distances: dict) -> dict:
    """`images` is how many each contender encodes in a turn."""
    per_image = {name: [time / images[name] for time in times] for name, times in seconds.items()}
    best = min((name for name in per_image if name in OURS), key=lambda name: statistics.median(per_image[name]))
    others = {name: name for name in per_image if name not in OURS} | {"channels": "channels"}
    return {
        "model": model,
        "gflop": count_gflop(model),
        "seconds": summarise(per_image),
        "best": best,
        "ratios": {
            f"ours_vs_{name}": median_ratio(per_image, name, best)
            for name in others
            if name in per_image and name != best
        },
        "distance": distances,
    }


@torch.inference_mode()
def measure_on_gpu(model: str, rounds: int, batches: list[int], fast: Path | None) -> dict:
    """Each contender alone first, for its best batch size; then all that run in turn."""
    torch._dynamo.config.recompile_limit = 64  # two graphs for each contender and batch size, of one function
    side = SIZES[model].input_size
    pixels = draw_images(max(batches), "cuda", side)
    makers = makers_on_gpu(model, fast)
    with torch.backends.cudnn.flags(allow_tf32=False):
        expected = torch.cat([makers["published"]()(pixels[i : i + 1]) for i in range(2)])
    distances, rates, sizes, failed = {}, {}, {}, {}
    for name, make in makers.items():
        try:
            encode = make()
            # Two images and not one: segment-anything-fast says of itself that one comes out wrong for ViT-B and L.
            distances[name] = distance(
                torch.cat([encode(one) for one in pixels[:2].split(batch_of(name, 2))]), expected
            )
            rates[name] = probe(encode, pixels, [1] if name.startswith("published") else batches)
            sizes[name] = max(rates[name], key=rates[name].get)
        except Exception as error:  # a compiler's, a checkout's, the memory's
            failed[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        print(f"  {name}: {failed.get(name) or rates[name]}, distance {distances.get(name)}", flush=True)
        encode = None
        forget()
    running = {name: makers[name]() for name in sizes}
    turns = {name: max(1, round(rates[name][size] / size)) for name, size in sizes.items()}  # about a second

    def take_turn(name: str) -> None:
        for _ in range(turns[name]):
            running[name](pixels[: sizes[name]])

    seconds = alternate({name: lambda name=name: take_turn(name) for name in running}, rounds)
    images = {name: turns[name] * size for name, size in sizes.items()}
    case = describe_case(model, seconds, images, distances)
    del running
    forget()
    return case | {"batch": sizes, "images_per_s_by_batch": rates, "not_measured": failed}


def batch_of(name: str, images: int) -> int:
    return 1 if name.startswith("published") else images


def forget() -> None:
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def probe(encode: Encode, pixels: Tensor, batches: list[int]) -> dict[int, float]:
    """Images/s by batch size; a size that does not fit the memory is left out."""
    rates = {}
    for size in batches:
        try:
            for _ in range(3):
                encode(pixels[:size])
            torch.cuda.synchronize()
            started, done = time.perf_counter(), 0
            while done < 3 or time.perf_counter() - started < 1:
                encode(pixels[:size])
                torch.cuda.synchronize()
                done += 1
            rates[size] = done * size / (time.perf_counter() - started)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    if not rates:
        raise MemoryError(f"no batch out of {batches} fits")
    return rates


def render(result: dict) -> str:
    device, rate = result["device"], max(result["product_gflop_per_s"].values())
    rows, said = [], []
    for case in result["cases"]:
        for name, found in case["seconds"].items():
            per_s = 1 / found["median_s"]
            rows.append(
                [
                    case["model"],
                    f"**{name}**" if name == case["best"] else name,
                    *([case["batch"][name]] if "batch" in case else []),
                    f"{per_s:.3g}",
                    f"{case['seconds']['published']['median_s'] / found['median_s']:.2f}x",
                    f"{case['gflop'] * per_s / rate:.0%}",
                    f"{case['distance'][name]:.1e}",
                ]
            )
        share = case["gflop"] / case["seconds"][case["best"]]["median_s"] / rate
        targets = [
            f"{case['ratios'][name]:.2f}x {name.removeprefix('ours_vs_')} "
            f"({'met' if case['ratios'][name] >= target else 'missed'}: {target}x)"
            for name, target in TARGETS[device].items()
            if name in case["ratios"]
        ]
        if device == "cuda":
            target = SHARES.get(case["model"], 0)
            targets.append(
                f"{share:.0%} of the rate of products ({'met' if share >= target else 'missed'}: {target:.0%})"
            )
        said.append(f"{case['model']}: {', '.join(targets)}.")
    head = ["model", "contender", *(["batch"] if device == "cuda" else []), "images/s", "against published",
            "of the rate of products", "distance from published"]  # fmt: skip
    rates = ", ".join(f"{value / 1000:.3g} TFLOP/s by {name}" for name, value in result["product_gflop_per_s"].items())
    failed = [
        f"- {case['model']}, {name}: not measured ({reason})"
        for case in result["cases"]
        for name, reason in case.get("not_measured", {}).items()
    ]
    skipped = [f"- {name}: not measured" for name in result["skipped"]]
    bound = BOUNDS[device]
    exact = all(case["distance"][case["best"]] < bound for case in result["cases"])
    closing = (
        f"One large product: {rates}. Ours {'is' if exact else 'is NOT'} within {bound:g} of the published encoder."
    )
    parts = [table(head, rows), " ".join(said), closing, "\n".join(failed + skipped)]
    return "\n\n".join(part for part in parts if part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SIZES))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 16, 32], help="on cuda")
    parser.add_argument("--segment-anything-fast", type=Path, metavar="CHECKOUT")
    options = parser.parse_args()
    everything = ["vit_b", "vit_l", "vit_h"]
    models = options.models or (everything if options.device == "cuda" else list(ROUNDS_ON_CPU))
    if options.device == "cpu":
        keep_freed_memory()  # as every command of samcache does, for all contenders
    rates = product_rates(options.device)
    print(f"one large product: {rates} GFLOP/s", flush=True)
    cases = []
    for model in models:
        if options.device == "cuda":
            case = measure_on_gpu(model, options.rounds or 5, options.batches, options.segment_anything_fast)
        else:
            case = measure_on_cpu(model, options.rounds or ROUNDS_ON_CPU.get(model, 1))
        cases.append(case)
        print(f"{model}: {case['ratios']}", flush=True)
    result = {
        "device": options.device,
        "cases": cases,
        "ratios": {f"{case['model']}_{name}": ratio for case in cases for name, ratio in case["ratios"].items()},
        "product_gflop_per_s": rates,
        "skipped": [model for model in everything if model not in models],
        "settings": {
            name: value if not isinstance(value, Path) else str(value) for name, value in vars(options).items()
        },
        "machine": describe_machine(),
    }
    print(render(result))
    write_results(f"encoder_{options.device}", result)


if __name__ == "__main__":
    main()
