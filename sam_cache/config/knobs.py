"""Knobs that several stages share, by what they are about."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from sam_cache.config.base import Device, Fraction, Integers, Model, Names, Positive, Precision, StageConfig


class DatasetKnobs(StageConfig):
    dataset: Literal["coco", "lvis", "masks", "pairs", "synthetic"] = Field(
        "lvis", description="Format of the dataset."
    )
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
    pairs: Names | None = Field(
        None, description="Training sets of --dataset pairs, with a binary mask per image: NAME=IMAGES:MASKS,..."
    )
    val_pairs: Names | None = Field(None, description="Sets of --dataset pairs that are held out, written likewise.")
    mask_maximum: Literal[1, 255] = Field(255, description="Value of an object in the masks of --dataset pairs.")
    scenes: Positive = Field(64, description="Synthetic scenes to generate.")
    scene_seed: int = Field(0, ge=0, description="Seed of the synthetic scenes.")
    limit: Positive | None = Field(
        None, description="Only the first N images; those of --dataset pairs are of its sets in turn."
    )


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
    box_noise: bool = Field(True, description="Move the sides of boxes a little while training, as SAM did.")
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
    loss: Literal["focal-dice", "bce-iou", "balanced-bce-iou", "points", "uncertain-points"] = Field(
        "focal-dice",
        description="SAM's loss, SAM-Adapter's two, or cross entropy and Dice at points of the mask: spread evenly, "
        "so that no more than these is decoded and a step is fastest, or mostly where it is unsure, as in HQ-SAM.",
    )
    loss_points: Positive | None = Field(
        None, description="Points per mask of the two point losses. Default: 1,024 and 12,544."
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


class RunKnobs(StageConfig):
    run: Path = Field(description="Run folder of a training.")
    which: Literal["best", "last"] = Field("best", description="Checkpoint to take.")
    checkpoint: Path | None = Field(
        None, description="Base weights of the run. Default: those it was trained from, where they were."
    )
