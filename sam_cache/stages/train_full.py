"""Train end to end from images: adapters in the encoder, or any part of the network."""

from sam_cache.batches import Cursor, LiveBatches, Order, Preprocessing
from sam_cache.config import TrainFullConfig
from sam_cache.data import parse_augmentation
from sam_cache.errors import DatasetError
from sam_cache.model import Sam, attach, estimate_memory, load_sam
from sam_cache.ranks import Ranks
from sam_cache.stages.device import pick_device, pick_mask_budget, pick_precision
from sam_cache.stages.embedding_store import checkpoint_of
from sam_cache.stages.live_data import LiveData
from sam_cache.stages.progress import say
from sam_cache.stages.source import open_source, where_of
from sam_cache.stages.training import Course, choose_parts, make_sampling, train
from sam_cache.stages.tuned_sam import adapter_knobs, digest_of_top

EVERYTHING = ("encoder", "neck", "prompt", "decoder")
BESIDE_AN_ADAPTER = ("no-mask", "decoder")  # as SAM-Adapter's code does


def train_full(cfg: TrainFullConfig) -> int:
    """Train from the dataset's images; returns 0, or raises Interrupted once a checkpoint holds where it stopped."""
    ranks = Ranks.from_env()
    device = pick_device(cfg.device, ranks)
    precision = pick_precision(cfg.precision, device, "--precision")
    sam = open_sam(cfg)
    checkpointing = device.type == "cuda" if cfg.checkpointing is None else cfg.checkpointing
    sam.image_encoder.checkpointing = checkpointing
    data = open_data(cfg, sam.size.input_size)
    images = data.images(sam.size.mask_size, make_sampling(cfg), parse_augmentation(cfg.augment))

    def open_batches(order: Order, cursor: Cursor) -> LiveBatches:
        return LiveBatches(images, order, batch_size=cfg.batch_size, ranks=ranks, threads=cfg.threads, cursor=cursor)

    estimate = estimate_memory(
        sam,
        images=-(-cfg.batch_size // ranks.world),
        prompts=pick_mask_budget(cfg.mask_budget, device),
        precision=precision,
        checkpointing=checkpointing,
    )
    course = Course(
        "train-full",
        sam,
        data,
        data,
        data.held_out,
        open_batches,
        describe(cfg, sam, data, precision),
        layer_decay=cfg.layer_decay,
        estimate=estimate,
    )
    try:
        return train(cfg, course, device, precision, ranks)
    finally:
        data.report_problems()


def open_sam(cfg: TrainFullConfig) -> Sam:
    """The whole network with its adapter, only the parts of --train free to move."""
    sam = load_sam(cfg.model, checkpoint_of(cfg), cfg.input_size, cfg.normalise)
    knobs = adapter_knobs(cfg)
    if knobs is not None:
        attach(sam.image_encoder, knobs, cfg.seed)
    default = BESIDE_AN_ADAPTER if knobs else EVERYTHING
    choose_parts(cfg, default if cfg.train is None else cfg.train, sam, adapter=knobs is not None)
    return sam


def open_data(cfg: TrainFullConfig, input_size: int) -> LiveData:
    """The images of the dataset that is asked for. Raises DatasetError where none is left to train on."""
    dataset = open_source(cfg)
    for note in dataset.notes:
        say(note)
    how = Preprocessing(input_size, cfg.fit, cfg.normalise, cfg.resize, cfg.intensity)
    style = "lvis" if cfg.dataset == "lvis" else "coco"
    data = LiveData.of(dataset, where_of(cfg), how, style, cfg.held_out, cfg.seed)
    if not len(data.train):
        raise DatasetError(f"--held-out {cfg.held_out}: none of {len(data.rows)} images is left to train on; lower it")
    return data


def describe(cfg: TrainFullConfig, sam: Sam, data: LiveData, precision: str) -> dict:
    """What the run is given; `eval`, `export` and `predict` open it from here."""
    return {
        "stage": "train-full",
        "identity": {"model": cfg.model, "encoder": sam.image_encoder.digest, "top": digest_of_top(sam)},
        "model": cfg.model,
        "input_size": sam.size.input_size,
        "precision": precision,
        "trained": data.names(data.train),
        "held_out": data.names(data.held_out),
    }
