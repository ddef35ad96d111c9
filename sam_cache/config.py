"""Every knob, once: one strict model per stage, one field per knob.

A field is a `--kebab-flag`, a TOML key of a recipe and a line of the resolved configuration that
goes into run folders and stores. Precedence: defaults < recipe `[shared]` < recipe `[stage]` < flags.
"""

import difflib
import os
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from sam_cache.errors import UsageError

Config = TypeVar("Config", bound="StageConfig")
Model = Literal["vit_b", "vit_l", "vit_h", "nano", "tiny"]
Device = Literal["cpu", "cuda", "mps"]
Precision = Literal["fp32", "bf16", "fp16"]


def home() -> Path:
    """Where datasets and official checkpoints are looked for: $SAMCACHE_HOME, else ~/.cache/samcache."""
    return Path(os.environ.get("SAMCACHE_HOME", "~/.cache/samcache")).expanduser()


def _split_integers(value: Any) -> Any:
    return tuple(int(part) for part in value.split(",") if part.strip()) if isinstance(value, str) else tuple(value)


# Written "1,2" on the command line, [1, 2] in a recipe.
Integers = Annotated[tuple[int, ...], BeforeValidator(_split_integers), PlainSerializer(list)]
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class StageConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class DatasetKnobs(StageConfig):
    dataset: Literal["coco", "lvis", "masks", "synthetic"] = Field("lvis", description="Format of the dataset.")
    root: Path | None = Field(
        None, description="Dataset folder in its standard layout. Default: $SAMCACHE_HOME/data/<dataset>."
    )
    split: str | None = Field(None, description="Split to read, such as train or val; default: the format's own.")
    images: Path | None = Field(None, description="Image folder, where the layout is not the standard one.")
    annotations: Path | None = Field(None, description="COCO or LVIS JSON file that goes with --images.")
    masks: Path | None = Field(None, description="Mask folder that goes with --images (--dataset masks).")
    mask_pattern: str = Field(
        "{stem}.*",
        description="Mask file of an image: {stem} its name, {dir} its folder, * several instances.",
    )
    objects_per: Literal["class", "component"] = Field(
        "class", description="Class-index masks: one object per class, or per connected component."
    )
    ignore_values: Integers | None = Field(
        None, description="Class-index masks: values that are no object. Default: 0 and 255."
    )
    scenes: Positive = Field(64, description="Synthetic scenes to generate.")
    scene_seed: int = Field(0, ge=0, description="Seed of the synthetic scenes.")
    limit: Positive | None = Field(None, description="Only the first N images.")


class DeviceKnobs(StageConfig):
    device: Device | None = Field(None, description="Default: cuda where there is one, else cpu.")


class EmbedConfig(DeviceKnobs, DatasetKnobs):
    model: Model = Field("vit_h", description="Size of SAM; nano has fixed-seed weights and needs no file.")
    checkpoint: Path | None = Field(
        None, description="Weights file. Default: the official file name under $SAMCACHE_HOME/checkpoints."
    )
    store: Path = Field(Path("emb.zarr"), description="Store to create, or to finish.")
    dtype: Literal["fp16", "fp32", "bf16"] = Field("fp16", description="Storage type of the embeddings.")
    codec: Literal["raw", "zstd", "blosc"] = Field("raw", description="Compression of stored rows.")
    shard_rows: Positive = Field(64, description="Rows in one shard, the unit of an atomic write.")
    batch_size: Positive = Field(1, description="Images per encoder call.")
    compute_dtype: Precision | None = Field(None, description="Encoder arithmetic. Default: bf16 on cuda, else fp32.")
    input_size: Positive | None = Field(None, description="Side of the square input. Default: the model's, 1024.")
    fit: Literal["longest", "squash"] = Field(
        "longest", description="longest: keep the aspect ratio and pad; squash: fill the square."
    )
    normalise: Literal["sam", "imagenet", "minmax"] = Field("sam", description="Pixel normalisation.")
    resize: Literal["upstream", "fast"] = Field(
        "upstream", description="upstream: SamPredictor's bytes; fast: 5x quicker, up to 2 grey levels off."
    )
    intensity: Literal["full", "percentile"] = Field("full", description="How 16-bit images become 8-bit.")
    threads: Positive = Field(4, description="Threads that decode images ahead of the encoder.")
    strict: bool = Field(False, description="Exit 1 when any image was skipped.")


class PromptKnobs(StageConfig):
    seed: int = Field(0, ge=0, description="Seed of order, sampling and prompts.")
    held_out: Fraction = Field(
        0.1, description="Share of images kept for evaluation where the dataset names no split; 0 keeps none."
    )
    annotations: Path | None = Field(
        None, description="COCO or LVIS JSON whose objects replace the store's for this run."
    )
    partial: bool = Field(False, description="Work with the committed rows of an unfinished store.")


class TrainTopConfig(DeviceKnobs, PromptKnobs):
    store: Path = Field(Path("emb.zarr"), description="Store to train from.")
    out: Path | None = Field(None, description="Run folder. Default: runs/train-top-<time>.")
    resume: bool = Field(False, description="Go on from the last checkpoint in --out.")
    checkpoint: Path | None = Field(None, description="Weights to start from, instead of the store's base weights.")
    train: str = Field("prompt,decoder", description="Parts to train: prompt, decoder.")
    prompts: str = Field("point,box", description="Prompt kinds, optionally weighted: box:2,centroid.")
    steps: Positive | None = Field(None, description="Optimizer steps to train to.")
    epochs: Positive | None = Field(None, description="Passes over the training rows to train to. Default: 10.")
    batch_size: Positive = Field(4, description="Images per batch.")
    accumulation: Positive = Field(1, description="Batches per optimizer step.")
    max_objects: Positive = Field(32, description="Objects sampled from one image in one epoch.")
    scale_sampled: bool = Field(
        False, description="Weigh sampled objects by n/kept, so that crowded images count in full."
    )
    mask_budget: Positive | None = Field(
        None, description="Prompts decoded at once; the gradient does not depend on it. Default: 64 on cuda, else 16."
    )
    learning_rate: float = Field(1e-4, gt=0, description="AdamW learning rate after warm-up.")
    weight_decay: float = Field(0.01, ge=0, description="AdamW weight decay.")
    warmup: int = Field(50, ge=0, description="Steps of linear warm-up.")
    schedule: Literal["cosine", "step", "constant"] = Field("cosine", description="Decay after warm-up.")
    milestones: Integers = Field((), description="Steps at which the step schedule decays.")
    gamma: float = Field(0.1, gt=0, description="Factor of one decay of the step schedule.")
    clip: float = Field(1.0, ge=0, description="Largest gradient norm; 0 does not clip.")
    precision: Precision | None = Field(None, description="Autocast type. Default: bf16 on cuda, else fp32.")
    focal_weight: float = Field(20.0, ge=0, description="Weight of the focal loss.")
    dice_weight: float = Field(1.0, ge=0, description="Weight of the dice loss.")
    iou_weight: float = Field(1.0, ge=0, description="Weight of the IoU head's squared error.")
    evaluate_every: Positive | None = Field(None, description="Steps between evaluations. Default: ten in a run.")
    evaluate_images: Positive = Field(64, description="Held-out images looked at by each of these evaluations.")
    eval_store: Path | None = Field(None, description="Evaluate on this store instead of held-out rows.")
    save_every: Positive | None = Field(None, description="Steps between checkpoints. Default: at evaluations.")
    threads: Positive = Field(2, description="Threads that read rows and draw prompts ahead of the training step.")


class EvalConfig(DeviceKnobs, PromptKnobs):
    store: Path = Field(Path("emb.zarr"), description="Store to evaluate on.")
    run: Path | None = Field(None, description="Run folder of train-top; without it, untouched SAM alone.")
    prompts: str = Field("centroid,interior,point,box", description="Prompt kinds, each evaluated by itself.")
    rows: Literal["held-out", "all"] = Field("held-out", description="Rows to evaluate.")
    json_file: Path | None = Field(None, alias="json", description="Also write the report to this file.")
    out: Path | None = Field(None, description="Folder for report and overlays. Default: runs/eval-<time>.")
    overlays: int = Field(8, ge=0, description="Images drawn as overlays.")
    mask_budget: Positive | None = Field(None, description="Prompts decoded at once. Default: 64 on cuda, else 16.")
    average_precision: bool = Field(True, description="Also compute COCO or LVIS mask AP.")


class VerifyConfig(DeviceKnobs):
    store: Path = Field(Path("emb.zarr"), description="Store to check.")
    repair: bool = Field(False, description="Drop damaged shards, so that embed makes them again.")
    retry_failed: bool = Field(False, description="Drop shards with failed rows, so that embed tries them again.")
    as_json: bool = Field(False, alias="json", description="Print the report as JSON.")


class InfoConfig(DeviceKnobs):
    store: Path = Field(Path("emb.zarr"), description="Store to describe.")
    as_json: bool = Field(False, alias="json", description="Print as JSON.")


def resolve(model: type[Config], values: dict[str, Any], source: str) -> Config:
    """Validate `values` (field names or aliases); a misfit is a one-line UsageError naming `source`."""
    known = {field.alias or name for name, field in model.model_fields.items()}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
            raise UsageError(f"{source}: unknown key {key!r}; {hint}")
    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise UsageError(
            f"{source}: {field} = {first['input']!r}: {first['msg'][:1].lower()}{first['msg'][1:]}"
        ) from None
