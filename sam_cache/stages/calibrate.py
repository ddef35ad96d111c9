"""What storage types and codecs cost with the user's own weights and images; which is the smallest that will do."""

import json
import shutil
import statistics
from pathlib import Path

import numpy as np

from sam_cache.batches import is_held_out
from sam_cache.config import (
    CalibrateConfig,
    DatasetKnobs,
    DeviceKnobs,
    EmbedConfig,
    ModelKnobs,
    PixelKnobs,
    TrainTopConfig,
)
from sam_cache.data import Dataset, parse_prompts
from sam_cache.errors import Interrupted, UsageError
from sam_cache.ranks import Ranks
from sam_cache.stages.cached_data import CachedData
from sam_cache.stages.calibration import Findings, print_table, verdict
from sam_cache.stages.codec_trial import CANDIDATES, CODECS, EXACT, SCRATCH, Values, copy_as, sample_rows, try_codec
from sam_cache.stages.device import pick_device, pick_mask_budget
from sam_cache.stages.embed import embed
from sam_cache.stages.progress import Bar, hushed, say
from sam_cache.stages.scoring import SCORES, Evaluation
from sam_cache.stages.train_top import train_top
from sam_cache.stages.tuned_sam import open_tuned_top
from sam_cache.store import EmbeddingStore
from sam_cache.training import RunFolder

SAMPLE = 32  # rows to measure a codec on


def calibrate(cfg: CalibrateConfig, dataset: Dataset | None = None) -> int:
    """Measure, train, and print the table; returns 0. What is done is found in `--out`, and not done again.

    `dataset` stands in for the one that `cfg` describes. Raises UsageError where `--out` is about something else.
    """
    if (world := Ranks.from_env().world) > 1:
        raise UsageError(f"WORLD_SIZE={world}: calibrate runs in one process; start it without torchrun")
    found = Findings.open(cfg)
    seeds = range(cfg.seed, cfg.seed + cfg.seeds)
    trials = [(values, codec) for values in CANDIDATES for codec in CODECS if not found.measured(values, codec)]
    trainings = {values: [seed for seed in seeds if not found.scored(values, seed)] for values in CANDIDATES}
    count = sum(map(len, trainings.values()))
    if trials or count:
        exact = embed_exactly(cfg, dataset)
        with Bar("codecs", len(trials), "codecs") as bar:
            given = sample_rows(exact, SAMPLE)
            found.note_shape(given.shape[1:])
            for values, codec in trials:
                found.note_codec(values, codec, try_codec(exact, given, values, codec, cfg.out))
                bar.advance()
        with Bar("trainings", count, "trainings") as bar:
            for values, todo in trainings.items():
                for seed in todo:
                    if not found.scored(values, seed):  # for rows may turn out not to fit
                        train_and_score(cfg, found, exact, values, seed)
                    bar.advance(note=values.name)
                shutil.rmtree(copy_path(cfg, values), ignore_errors=True)
        for left in (cfg.out / "runs", *cfg.out.glob(f"{SCRATCH}*")):  # the latter by a kill
            shutil.rmtree(left, ignore_errors=True)
    report = found.report(seeds, cfg.bound)
    if cfg.as_json:
        print(json.dumps(report, indent=2))
    else:
        print_table(report)
        print(verdict(report))
    say(f"wrote {found.path}")
    return 0


def embed_exactly(cfg: CalibrateConfig, dataset: Dataset | None) -> EmbeddingStore:
    """All images once through the encoder, in fp32: what every other type is made from."""
    knobs = {name for model in (DatasetKnobs, ModelKnobs, PixelKnobs, DeviceKnobs) for name in model.model_fields}
    asked = {name: getattr(cfg, name) for name in knobs | {"compute_dtype"}}
    path = cfg.out / "exact.zarr"
    embed(EmbedConfig(**asked, store=path, dtype=EXACT.dtype), dataset)
    return EmbeddingStore.open(path)


def copy_path(cfg: CalibrateConfig, values: Values) -> Path:
    return cfg.out / f"{values.name.replace(' ', '-')}.zarr"


def train_and_score(cfg: CalibrateConfig, found: Findings, exact: EmbeddingStore, values: Values, seed: int) -> None:
    """Train a decoder from rows of this type and score it on the exact ones, as those of the live encoder are."""
    images = exact.images
    held_out = is_held_out(images.ids, images.splits, cfg.held_out, cfg.seed)  # the same whatever the seed
    store, failed = copy_as(exact, values, copy_path(cfg, values), np.where(held_out, "val", "train").tolist())
    if failed:
        return found.note_failure(values, failed)
    run = cfg.out / "runs" / f"{values.name.replace(' ', '-')}-{seed}"
    with hushed():
        try:
            train_top(
                TrainTopConfig(
                    store=store.path, out=run, resume=(run / "config.json").exists(), seed=seed, steps=cfg.steps,
                    prompts=cfg.prompts, batch_size=cfg.batch_size, learning_rate=cfg.learning_rate,
                    warmup=min(50, cfg.steps // 4), evaluate_every=cfg.steps, evaluate_images=1, pictures=0,
                    trackers=(), device=cfg.device,
                )
            )  # fmt: skip
        except Interrupted:
            raise Interrupted(f"stopped; {cfg.out} keeps what is done, the same command goes on from there") from None
        found.note_score(values, seed, score(cfg, exact, RunFolder.open(run)))
    shutil.rmtree(run)


def score(cfg: CalibrateConfig, exact: EmbeddingStore, run: RunFolder) -> dict[str, float]:
    """Mean IoU and boundary IoU over the objects of each kind of prompt, and then over kinds."""
    device, mixture, record = pick_device(cfg.device, Ranks()), parse_prompts(cfg.prompts), run.read_json("record.json")
    data = CachedData.open(exact.path, annotations=None, partial=False, held_out=cfg.held_out, seed=cfg.seed)
    data = data.holding_out(record["trained"], record["held_out"])
    network = open_tuned_top(run, "last", data.store).to(device)
    budget = pick_mask_budget(None, device)
    means = Evaluation(network, data, data.held_out, mixture, cfg.seed, budget, device)()
    return {name: statistics.fmean(means[f"{name}/{kind}"] for kind in mixture.kinds) for name in SCORES} | {
        "images": len(data.held_out)
    }
