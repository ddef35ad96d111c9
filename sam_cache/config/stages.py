"""One model per stage: the knobs it shares, and its own."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from sam_cache.config.base import HqOutput, Names, Positive, Precision, Stored
from sam_cache.config.knobs import (
    AdapterKnobs,
    DatasetKnobs,
    DeviceKnobs,
    ModelKnobs,
    ObjectKnobs,
    PixelKnobs,
    RunKnobs,
    SplitKnobs,
    TrainingKnobs,
)


# The knobs of the base named last come first in --help.
class EmbedConfig(DeviceKnobs, PixelKnobs, ModelKnobs, DatasetKnobs):
    store: Path = Field(Path("emb.zarr"), description="Store to create, or to finish.")
    levels: Names = Field(("neck",), description="What to store: neck, and early where an HQ head is to be trained.")
    dtype: Stored = Field("fp16", description="Storage type of the embeddings.")
    early_dtype: Stored | None = Field(
        None, description="Storage type of the early level, most of the bytes. Default: --dtype."
    )
    codec: Literal["raw", "zstd", "blosc"] = Field("raw", description="Compression of stored rows.")
    keep_bits: Positive | None = Field(
        None, description="Bits of the mantissa to keep in floating levels: fewer compress better. Default: all."
    )
    views: str = Field(
        "identity",
        description="Views of each image, a row each: identity, hflip, lsj:4 (jitters), tile:1024:128 (side:overlap).",
    )
    shard_rows: Positive = Field(64, description="Rows in one shard, the unit of an atomic write.")
    batch_size: Positive | None = Field(None, description="Images per encoder call. Default: 8 on cuda, else 1.")
    compute_dtype: Precision | None = Field(None, description="Encoder arithmetic. Default: bf16 on cuda, else fp32.")
    compile: bool | None = Field(
        None, description="Compile the encoder, for a minute. Default: on cuda, from 4,000 rows."
    )
    threads: Positive | None = Field(
        None,
        description="Threads that decode ahead of the encoder. Default: one for each core; on cpu all is done in turn.",
    )
    strict: bool = Field(False, description="Exit 1 when any image was skipped.")


class TrainTopConfig(DeviceKnobs, ObjectKnobs, SplitKnobs, TrainingKnobs):
    store: Path = Field(Path("emb.zarr"), description="Store to train from.")
    checkpoint: Path | None = Field(None, description="Weights to start from, instead of the store's base weights.")
    head: Literal["sam", "hq"] = Field(
        "sam", description="sam: SAM's own masks; hq: those of HQ-SAM's head, which needs the store's early level."
    )
    hq_output: HqOutput = Field(
        "hq", description="Masks of the HQ head: its own alone, or the sum of its logits and SAM's."
    )
    train: Names = Field(
        default_factory=lambda given: ("head",) if given["head"] == "hq" else ("prompt", "decoder"),
        description="Parts to train: prompt, no-mask, decoder, head. Default: prompt,decoder; with the HQ head, head.",
    )
    eval_store: Path | None = Field(None, description="Evaluate on this store instead of held-out rows.")
    views: str | None = Field(
        None, description="Views to train on, such as identity,lsj:2. Default: all that the store holds."
    )
    view: Literal["identity", "tile"] | None = Field(
        None,
        description="View of held-out images to evaluate while training. Default: identity where stored, else tiles, "
        "merged.",
    )


class TrainFullConfig(DeviceKnobs, SplitKnobs, TrainingKnobs, PixelKnobs, ModelKnobs, DatasetKnobs, AdapterKnobs):
    train: Names | None = Field(
        None,
        description="Parts to train: encoder, neck, prompt, no-mask, decoder. Default: "
        "no-mask,decoder beside an adapter, else all.",
    )
    batch_size: Positive = Field(2, description="Images per batch, those of all processes together.")
    augment: str = Field(
        "none", description="hflip, vflip, rotate90, jitter:0.1-2.0, colour:0.2, with commas between; or none."
    )
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="Factor on the learning rate for every layer farther from the masks."
    )
    checkpointing: bool | None = Field(
        None, description="Keep block inputs alone for the backward; slower, far less memory. Default: on cuda."
    )


class EvalConfig(DeviceKnobs, SplitKnobs, ObjectKnobs):
    store: Path | None = Field(
        None, description="Store to evaluate on. Default: emb.zarr; a run of train-full brings its own images."
    )
    run: Path | None = Field(None, description="Run folder of a training; without it, untouched SAM alone.")
    which: Literal["best", "last"] = Field("best", description="Checkpoint of the run to take.")
    root: Path | None = Field(None, description="Dataset folder of a run of train-full, where it has moved.")
    checkpoint: Path | None = Field(
        None,
        description="Base weights of a run of train-full; without a run, weights to score beside those of the store.",
    )
    hq_output: HqOutput | None = Field(
        None,
        description="Masks of an HQ head: its own alone, or the sum with SAM's. Default: as trained, or the sum.",
    )
    prompts: str = Field("centroid,interior,point,box", description="Prompt kinds, each evaluated by itself.")
    rows: Literal["held-out", "all"] = Field("held-out", description="Rows to evaluate.")
    view: Literal["identity", "tile"] | None = Field(
        None, description="View of each image to evaluate. Default: identity where stored, else tiles, merged."
    )
    json_file: Path | None = Field(None, alias="json", description="Also write the report to this file.")
    out: Path | None = Field(None, description="Folder for report and overlays. Default: runs/eval-<time>.")
    overlays: int = Field(8, ge=0, description="Images drawn as overlays.")
    mask_budget: Positive | None = Field(None, description="Prompts decoded at once. Default: 64 on cuda, else 16.")
    average_precision: bool = Field(True, description="Also compute COCO or LVIS mask AP.")


class CalibrateConfig(DeviceKnobs, SplitKnobs, PixelKnobs, ModelKnobs, DatasetKnobs):
    out: Path = Field(Path("calibration"), description="Folder for the table, and for what is in the making.")
    limit: Positive | None = Field(200, description="Images to calibrate on: the first N.")
    held_out: float = Field(0.3, gt=0, lt=1, description="Share of them kept for scoring, where no split says.")
    steps: Positive = Field(200, description="Optimizer steps of each training.")
    seeds: Positive = Field(3, description="Trainings of each type, with the seeds from --seed on.")
    bound: float = Field(0.005, ge=0, description="Largest loss of held-out mean IoU that a codec may cost.")
    prompts: str = Field("point,box", description="Prompt kinds of training and scoring.")
    batch_size: Positive = Field(4, description="Images per training batch.")
    learning_rate: float = Field(1e-4, gt=0, description="Learning rate after warm-up.")
    compute_dtype: Precision | None = Field(None, description="Encoder arithmetic. Default: bf16 on cuda, else fp32.")
    as_json: bool = Field(False, alias="json", description="Print as JSON.")


class ExportConfig(DeviceKnobs, RunKnobs):
    format: Literal["sam", "sam-hq"] = Field(
        "sam",
        description="Layout of the file: segment_anything's own, or segment_anything_hq's for a run with the HQ head.",
    )
    out: Path = Field(Path("sam.pth"), description="File to write.")


class PredictConfig(DeviceKnobs, RunKnobs):
    images: Path = Field(description="Folder of images.")
    boxes: Path | None = Field(None, description="COCO JSON whose boxes are the prompts, matched by file name.")
    prompts: Literal["boxes", "none"] = Field("boxes", description="boxes: those of --boxes; none: one mask per image.")
    out: Path = Field(Path("predictions"), description="Folder for predictions.json and masks/.")
    mask_budget: Positive | None = Field(None, description="Prompts decoded at once. Default: 64 on cuda, else 16.")


class VerifyConfig(DeviceKnobs):
    store: Path = Field(Path("emb.zarr"), description="Store to check.")
    repair: bool = Field(False, description="Drop damaged shards, so that embed makes them again.")
    retry_failed: bool = Field(False, description="Drop shards with failed rows, so that embed tries them again.")
    as_json: bool = Field(False, alias="json", description="Print the report as JSON.")


class InfoConfig(DeviceKnobs):
    store: Path = Field(Path("emb.zarr"), description="Store to describe.")
    as_json: bool = Field(False, alias="json", description="Print as JSON.")
