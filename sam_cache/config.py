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


def _split_names(value: Any) -> Any:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else tuple(value)


# Written "1,2" on the command line, [1, 2] in a recipe.
Integers = Annotated[tuple[int, ...], BeforeValidator(_split_integers), PlainSerializer(list)]
Names = Annotated[tuple[str, ...], BeforeValidator(_split_names), PlainSerializer(list)]
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
    classes: Integers | None = Field(
        None, description="Class-index masks: values that are classes; any other is an error in that mask."
    )
    ignore_values: Integers | None = Field(
        None, description="Class-index masks: values that are no object. Default: 0 and 255."
    )
    scenes: Positive = Field(64, description="Synthetic scenes to generate.")
    scene_seed: int = Field(0, ge=0, description="Seed of the synthetic scenes.")
    limit: Positive | None = Field(None, description="Only the first N images.")


class DeviceKnobs(StageConfig):
    device: Device | None = Field(None, description="Default: cuda where there is one, else cpu.")


class ModelKnobs(StageConfig):
    model: Model = Field("vit_h", description="Size of SAM; nano comes trained with the package.")
    checkpoint: Path | None = Field(
        None, description="Weights file. Default: the official file name under $SAMCACHE_HOME/checkpoints."
    )


class PixelKnobs(StageConfig):
    input_size: Positive | None = Field(None, description="Side of the square input. Default: the model's, 1024.")
    fit: Literal["longest", "squash"] = Field(
        "longest", description="longest: keep the aspect ratio and pad; squash: fill the square."
    )
    normalise: Literal["sam", "imagenet", "minmax"] = Field("sam", description="Pixel normalisation.")
    resize: Literal["upstream", "fast"] = Field(
        "upstream", description="upstream: SamPredictor's bytes; fast: 5x quicker, up to 2 grey levels off."
    )
    intensity: Literal["full", "percentile"] = Field("full", description="How 16-bit images become 8-bit.")


# The knobs of the base named last come first in --help.
class EmbedConfig(DeviceKnobs, PixelKnobs, ModelKnobs, DatasetKnobs):
    store: Path = Field(Path("emb.zarr"), description="Store to create, or to finish.")
    dtype: Literal["fp16", "fp32", "bf16"] = Field("fp16", description="Storage type of the embeddings.")
    codec: Literal["raw", "zstd", "blosc"] = Field("raw", description="Compression of stored rows.")
    shard_rows: Positive = Field(64, description="Rows in one shard, the unit of an atomic write.")
    batch_size: Positive = Field(1, description="Images per encoder call.")
    compute_dtype: Precision | None = Field(None, description="Encoder arithmetic. Default: bf16 on cuda, else fp32.")
    threads: Positive = Field(4, description="Threads that decode images ahead of the encoder.")
    strict: bool = Field(False, description="Exit 1 when any image was skipped.")


class SplitKnobs(StageConfig):
    seed: int = Field(0, ge=0, description="Seed of order, sampling and prompts.")
    held_out: Fraction = Field(
        0.1, description="Share of images kept for evaluation where the dataset names no split; 0 keeps none."
    )


class ObjectKnobs(StageConfig):
    annotations: Path | None = Field(
        None, description="COCO or LVIS JSON whose objects replace the store's for this run."
    )
    partial: bool = Field(False, description="Work with the committed rows of an unfinished store.")


class TrainingKnobs(StageConfig):
    out: Path | None = Field(None, description="Run folder. Default: runs/<stage>-<time>.")
    resume: bool = Field(False, description="Go on from the last checkpoint in --out.")
    prompts: str = Field("point,box", description="Prompt kinds, optionally weighted: box:2,centroid.")
    corrections: int = Field(
        0, ge=0, description="Rounds after the first, each with the mask so far and a click where it errs."
    )
    sampling: Literal["image", "object", "repeat-factor"] = Field(
        "image", description="What an epoch visits once: images, objects, or images by their rarest category (LVIS)."
    )
    repeat_threshold: float = Field(
        0.001,
        gt=0,
        lt=1,
        description="Repeat-factor sampling: categories in fewer images than this share come oftener.",
    )
    steps: Positive | None = Field(None, description="Optimizer steps to train to.")
    epochs: Positive | None = Field(None, description="Passes over the training images to train to. Default: 10.")
    batch_size: Positive = Field(4, description="Images per batch, those of all processes together.")
    accumulation: Positive = Field(1, description="Batches per optimizer step.")
    max_objects: Positive = Field(32, description="Objects asked for at one visit of an image.")
    scale_sampled: bool = Field(
        False, description="Weigh sampled objects by n/kept, so that crowded images count in full."
    )
    mask_budget: Positive | None = Field(
        None, description="Prompts decoded at once; the gradient does not depend on it. Default: 64 on cuda, else 16."
    )
    loss: Literal["focal-dice", "bce-iou", "balanced-bce-iou", "points"] = Field(
        "focal-dice", description="SAM's loss, SAM-Adapter's two, or cross entropy and Dice at 1,024 points."
    )
    mask_weight: Annotated[float, Field(ge=0)] | None = Field(
        None, description="Weight of the loss's first part. Default: 20 for focal-dice, else 1."
    )
    overlap_weight: Annotated[float, Field(ge=0)] | None = Field(
        None, description="Weight of its second part, Dice or IoU. Default: 1."
    )
    iou_weight: Annotated[float, Field(ge=0)] | None = Field(
        None, description="Weight of the IoU head's squared error. Default: 1."
    )
    learning_rate: float = Field(1e-4, gt=0, description="Learning rate after warm-up, of AdamW.")
    least_rate: float = Field(0.0, ge=0, description="Learning rate at which the cosine ends.")
    weight_decay: float = Field(0.01, ge=0, description="AdamW weight decay.")
    warmup: int = Field(50, ge=0, description="Steps of linear warm-up.")
    schedule: Literal["cosine", "step", "constant"] = Field("cosine", description="Decay after warm-up.")
    milestones: Integers = Field((), description="Steps at which the step schedule decays.")
    gamma: float = Field(0.1, gt=0, description="Factor of one decay of the step schedule.")
    clip: float = Field(1.0, ge=0, description="Largest gradient norm; 0 does not clip.")
    precision: Precision | None = Field(None, description="Autocast type. Default: bf16 on cuda, else fp32.")
    evaluate_every: Positive | None = Field(None, description="Steps between evaluations. Default: ten in a run.")
    evaluate_images: Positive = Field(64, description="Held-out images looked at by each of these evaluations.")
    best_by: str = Field("score", description="Metric of these that decides the best checkpoint, such as iou/box.")
    patience: Positive | None = Field(None, description="Stop after so many evaluations without a better one.")
    pictures: int = Field(4, ge=0, description="Held-out images drawn with their masks at each evaluation.")
    save_every: Positive | None = Field(None, description="Steps between checkpoints. Default: at evaluations.")
    trackers: Names = Field(("tensorboard",), description="Where metrics and pictures go: tensorboard, wandb.")
    threads: Positive = Field(2, description="Threads that read images or rows ahead of the training step.")


class TrainTopConfig(DeviceKnobs, ObjectKnobs, SplitKnobs, TrainingKnobs):
    store: Path = Field(Path("emb.zarr"), description="Store to train from.")
    checkpoint: Path | None = Field(None, description="Weights to start from, instead of the store's base weights.")
    train: Names = Field(("prompt", "decoder"), description="Parts to train: prompt, no-mask, decoder.")
    eval_store: Path | None = Field(None, description="Evaluate on this store instead of held-out rows.")


class AdapterKnobs(StageConfig):
    adapter: Literal["none", "sa", "lora", "spm"] = Field(
        "none", description="What to train in the encoder: SAM-Adapter, LoRA, a spatial prior, or no adapter."
    )
    sa_variant: Literal["official", "between"] = Field(
        "official", description="official: before every block; between: before the first and after each."
    )
    sa_scale_factor: int = Field(32, description="Official SAM-Adapter: encoder width over adapter width.")
    sa_tune_width: int | None = Field(None, description="Width of the tuning layers. Default: as published.")
    sa_bottleneck: int = Field(32, description="Between: inner width of an adapter.")
    sa_mask_ratio: float = Field(0.25, description="Share of low frequencies taken out of the image.")
    sa_start: Literal["official", "identity"] = Field(
        "identity", description="Initial weights; identity leaves untouched SAM's masks as they are."
    )
    lora_rank: int = Field(4, description="Rank of the low-rank updates.")
    lora_alpha: float = Field(4.0, description="Their scale is alpha over rank.")
    lora_targets: Names = Field(("q", "v"), description="Layers they are added to: q, k, v, proj, mlp.")
    lora_from_block: int = Field(0, description="First encoder block they are added to.")
    spm_rank: int = Field(16, description="Rank of the layers that lead from the spatial prior to q, k and v.")
    spm_channels: int = Field(256, description="Channels of its feature pyramid.")
    spm_backbone: Path | None = Field(
        None, description="Weights of its ResNet-50, a torchvision file. Default: random."
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
        None, description="Base weights of a run of train-full. Default: those it was trained from, where they were."
    )
    prompts: str = Field("centroid,interior,point,box", description="Prompt kinds, each evaluated by itself.")
    rows: Literal["held-out", "all"] = Field("held-out", description="Rows to evaluate.")
    json_file: Path | None = Field(None, alias="json", description="Also write the report to this file.")
    out: Path | None = Field(None, description="Folder for report and overlays. Default: runs/eval-<time>.")
    overlays: int = Field(8, ge=0, description="Images drawn as overlays.")
    mask_budget: Positive | None = Field(None, description="Prompts decoded at once. Default: 64 on cuda, else 16.")
    average_precision: bool = Field(True, description="Also compute COCO or LVIS mask AP.")


class RunKnobs(StageConfig):
    run: Path = Field(description="Run folder of a training.")
    which: Literal["best", "last"] = Field("best", description="Checkpoint to take.")
    checkpoint: Path | None = Field(
        None, description="Base weights of the run. Default: those it was trained from, where they were."
    )


class ExportConfig(DeviceKnobs, RunKnobs):
    format: Literal["sam"] = Field("sam", description="Layout of the file: sam is segment_anything's own.")
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


def with_absolute_paths(cfg: Config) -> Config:
    """The same, readable from any folder. What is relative to --root stays so; where things are written, too."""
    beside_root = {"images", "annotations", "masks"} if getattr(cfg, "root", None) else set()
    paths = {name: value for name, value in cfg if isinstance(value, Path) and name not in {"out", *beside_root}}
    return cfg.model_copy(update={name: path.absolute() for name, path in paths.items()})


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
