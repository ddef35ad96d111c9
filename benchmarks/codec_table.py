"""What storage types and codecs cost: bytes, speed, error, and the loss of a decoder trained from them.

    python benchmarks/codec_table.py [--steps 60] [--seeds 3] [--data /data]      # about twelve minutes on two cores

Everything is `samcache calibrate`'s own doing. Bytes, speed and error are of rows of full size: what the packaged
`nano` makes of generated scenes of 1024x1024, 256x64x64 values each. Every type is written raw, with blosc and with
zstd, in rounds of shuffled order; writing goes from fp32 in memory to synced files, reading from the page cache,
verified, into a reused buffer, both in one thread. MB/s count values as fp32, so that they compare whatever the type.

Losses are of decoders trained from each type with the same seeds, scored on held-out images by their exact levels, as
an exported decoder sees them: what fp32 scores more than the type, mean over seeds. The noise beside it is the
standard deviation of fp32's own score over the seeds. The sets are generated scenes and, where --data or
$SAMCACHE_TEST_DATA has it, a real one, both at 224 pixels.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from measure import describe_machine, table, write_results

from sam_cache import CalibrateConfig, EmbedConfig, EmbeddingStore, calibrate, embed
from sam_cache.stages.codec_trial import CANDIDATES, CODECS, sample_rows, try_codec

BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"
SCENES = {"dataset": "synthetic", "scene_seed": 5}  # nano was not trained on these
GOAL = 4.0  # times smaller than fp32


def measure_rows(model: str, rows: int, rounds: int, folder: Path) -> dict:
    """What `try_codec` says of every type and codec, medians of its rates, by name."""
    embed(EmbedConfig(model=model, store=folder / "rows.zarr", dtype="fp32", device="cpu", scenes=rows, **SCENES))
    exact = EmbeddingStore.open(folder / "rows.zarr")
    given = sample_rows(exact, rows)
    shape, shuffle = list(given.shape[1:]), random.Random(0)
    found: dict[str, list[dict]] = {f"{values.name} {codec}": [] for values in CANDIDATES for codec in CODECS}
    tries = [(values, codec) for values in CANDIDATES for codec in CODECS]
    for number in range(rounds + 1):
        shuffle.shuffle(tries)
        for values, codec in tries:
            tried = try_codec(exact, given, values, codec, folder)
            if number:  # the first round pays for pages and caches
                found[f"{values.name} {codec}"].append(tried)
        print(f"rows of {'x'.join(map(str, shape))}: round {number} of {rounds}", flush=True)
    row_bytes = given[0].nbytes
    codecs = {}
    for name, tried in found.items():
        rates = {
            f"{way}_mb_per_s": statistics.median(each[f"{way}_rows_per_s"] for each in tried) * row_bytes / 1e6
            for way in ("write", "read")
        }
        bytes_per_row = tried[0]["bytes_per_row"]
        smaller = row_bytes / bytes_per_row
        codecs[name] = {"bytes_per_row": bytes_per_row, "times_smaller": smaller, "error": tried[0]["error"]} | rates
    return {"shape": shape, "rows": rows, "rounds": rounds, "codecs": codecs}


def measure_losses(name: str, knobs: dict, options: argparse.Namespace, folder: Path) -> dict:
    print(f"{name}: {len(CANDIDATES)} types, {options.seeds} seeds, {options.steps} steps each", flush=True)
    cfg = CalibrateConfig(
        model=options.model, out=folder, steps=options.steps, seeds=options.seeds, prompts="box", batch_size=4,
        learning_rate=3e-4, input_size=options.input_size, device="cpu", **knobs,
    )  # fmt: skip
    with redirect_stdout(StringIO()):  # its table is made of small rows
        calibrate(cfg)
    report = json.loads((folder / "calibration.json").read_text())
    exact = [report["scores"][f"fp32 {seed}"] for seed in report["seeds"]]
    losses = {
        row["values"]: {key: row[key] for key in ("iou_loss", "boundary_iou_loss", "within_noise")}
        for row in report["table"]
    }
    return {
        "set": name,
        "images": exact[0]["images"],
        "iou": statistics.fmean(score["iou"] for score in exact),
        "boundary_iou": statistics.fmean(score["boundary_iou"] for score in exact),
        "seed_noise": report["seed_noise"],
        "losses": losses,
        "scores": report["scores"],
    }


def sets(data: Path, scenes: int) -> tuple[dict[str, dict], dict[str, str]]:
    """Dataset knobs by name; and what is not there, with where it was looked for."""
    found, fruits = {"generated scenes": {"scenes": scenes, **SCENES}}, data / "fruits_nuts"
    if not fruits.is_dir():
        return found, {"fruits_nuts": f"no folder {fruits}"}
    files = {"images": fruits / "images", "annotations": fruits / "trainval.json"}
    return found | {"fruits_nuts": {"dataset": "coco", **files}}, {}


def met(result: dict) -> list[str]:
    """Types and codecs at least four times smaller than fp32 that lose nothing outside the noise on any set."""
    return [
        name
        for name, row in result["rows"]["codecs"].items()
        if row["times_smaller"] >= GOAL
        and all(each["losses"][type_of(name)]["within_noise"] for each in result["sets"])
    ]


def type_of(name: str) -> str:
    return name.rpartition(" ")[0]


def render(result: dict) -> str:
    rows = sorted(result["rows"]["codecs"].items(), key=lambda item: item[1]["bytes_per_row"])
    codecs = table(
        ["values", "codec", "KiB a row", "smaller than fp32", "MB/s in", "MB/s out", "relative error"],
        [
            [
                type_of(name), name.rpartition(" ")[2], f"{row['bytes_per_row'] / 1024:,.0f}",
                f"{row['times_smaller']:.2f}x", f"{row['write_mb_per_s']:,.0f}", f"{row['read_mb_per_s']:,.0f}",
                f"{row['error']:.1e}",
            ]
            for name, row in rows
        ],
    )  # fmt: skip
    head = ["values"]
    for each in result["sets"]:
        head += [f"{each['set']}: IoU loss", "boundary IoU loss"]
    of_types = [
        ["noise of the seeds"]
        + [f"{each['seed_noise'][key]:.4f}" for each in result["sets"] for key in each["seed_noise"]]
    ]
    for values in result["sets"][0]["losses"]:
        cells = [each["losses"][values] for each in result["sets"]]
        of_types.append([values] + [f"{cell[key]:+.4f}" for cell in cells for key in ("iou_loss", "boundary_iou_loss")])
    held_out = "; ".join(
        f"{each['set']}, {each['images']} held-out images, fp32 scores IoU {each['iou']:.3f} and boundary IoU "
        f"{each['boundary_iou']:.3f}"
        for each in result["sets"]
    )
    good, codecs_by_name = met(result), result["rows"]["codecs"]
    told = f"The goal, {GOAL:.0f}x smaller than fp32 with no loss of IoU outside the noise of the seeds, is "
    if good:
        most = max(codecs_by_name[name]["times_smaller"] for name in good)
        told += f"met by {', '.join(good)}; the smallest of these is {most:.1f}x smaller."
    else:
        told += "not met."
    told += (
        f" int8 without a codec is {codecs_by_name['int8 raw']['times_smaller']:.2f}x smaller: scales, offsets and the "
        "pages that rows stand on are what is missing to 4."
    )
    trained = f"Each of {result['settings']['seeds']} decoders per type took {result['settings']['steps']} steps."
    return "\n\n".join([codecs, f"Losses: {held_out}. {trained}", table(head, sorted_types(of_types)), told])


def sorted_types(rows: list[list[str]]) -> list[list[str]]:
    """In the order of the candidates, the noise first."""
    order = ["noise of the seeds", *(values.name for values in CANDIDATES)]
    return sorted(rows, key=lambda row: order.index(row[0]))


def draw(result: dict):
    """Bytes against error, and bytes against the loss of IoU with the noise of the seeds around nought."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    errors, losses = figure.subplots(1, 2)
    codecs = result["rows"]["codecs"]
    markers = dict(zip(CODECS, "os^", strict=True))
    for codec, marker in markers.items():
        found = [row for name, row in codecs.items() if name.endswith(f" {codec}") and row["error"]]
        sizes, wrong = [row["bytes_per_row"] / 2**20 for row in found], [row["error"] for row in found]
        errors.scatter(sizes, wrong, marker=marker, label=codec)
    for name, row in codecs.items():
        if name.endswith(" raw") and row["error"]:
            errors.annotate(
                type_of(name), (row["bytes_per_row"] / 2**20, row["error"]), (4, 3), textcoords="offset points"
            )
    errors.set(xlabel="MiB a row", ylabel="relative error", yscale="log", title="what is stored")
    errors.legend()
    least = {values: min(row["bytes_per_row"] for name, row in codecs.items() if type_of(name) == values)
             for values in result["sets"][0]["losses"]}  # fmt: skip
    for each in result["sets"]:
        sizes = [least[values] / 2**20 for values in each["losses"]]
        drawn = losses.scatter(sizes, [loss["iou_loss"] for loss in each["losses"].values()], label=each["set"])
        noise = each["seed_noise"]["iou"]
        losses.axhspan(-noise, noise, alpha=0.12, color=drawn.get_facecolor()[0])
    losses.set(xlabel="MiB a row, by its smallest codec", ylabel="loss of held-out IoU", title="what it costs")
    losses.legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = Path(os.environ.get("SAMCACHE_TEST_DATA", BESIDE))
    parser.add_argument("--data", type=Path, default=data, help="folder of the real sets [default: %(default)s]")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--rows", type=int, default=16, help="rows of full size")
    parser.add_argument("--rounds", type=int, default=3, help="of these")
    parser.add_argument("--scenes", type=int, default=60, help="generated scenes to train on and to score")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--input-size", type=int, default=224, help="of what is trained on")
    options = parser.parse_args()
    known, missing = sets(options.data, options.scenes)
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure_rows(options.model, options.rows, options.rounds, Path(scratch))
        losses = [
            measure_losses(name, knobs, options, Path(scratch, str(number)))
            for number, (name, knobs) in enumerate(known.items())
        ]
    settings = {name: value for name, value in vars(options).items() if name != "data"}
    result = {"settings": settings, "rows": rows, "sets": losses, "not_measured": missing}
    result |= {"ratios": {"goal_met_by": met(result)}, "machine": describe_machine()}
    print(render(result))
    write_results("codecs_cpu", result)


if __name__ == "__main__":
    main()
