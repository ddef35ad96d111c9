"""Stage 2: train prompt encoder and mask decoder from a store alone."""

import numpy as np

from sam_cache.batches import CachedBatches, Cursor, Order
from sam_cache.config import TrainTopConfig
from sam_cache.errors import StoreError, UsageError
from sam_cache.model import HqOutput, Top, add_head, levels_of, load_top, top_from_bytes, top_to_bytes
from sam_cache.ranks import Ranks
from sam_cache.stages.cached_data import CachedData
from sam_cache.stages.device import pick_device, pick_precision
from sam_cache.stages.progress import say
from sam_cache.stages.training import Course, choose_parts, make_sampling, train
from sam_cache.stages.tuned_sam import START


def train_top(cfg: TrainTopConfig) -> int:
    """Train from `--store`; returns 0, or raises Interrupted once a checkpoint holds where it stopped."""
    ranks = Ranks.from_env()
    device = pick_device(cfg.device, ranks)
    precision = pick_precision(cfg.precision, device, "--precision")
    data = CachedData.open(
        cfg.store,
        annotations=cfg.annotations,
        partial=cfg.partial,
        held_out=0 if cfg.eval_store else cfg.held_out,
        seed=cfg.seed,
        levels=levels_of(hq_of(cfg)),
        views=cfg.views,
        view=None if cfg.eval_store else cfg.view,
    )
    top = open_top(cfg, data)
    annotator = data.annotator(top.size.mask_size, make_sampling(cfg))
    data = data.training_on(data.train[annotator.has_objects(data.train)])
    if not len(data.train):
        raise StoreError(f"{cfg.store}: no row with an object is left to train on; lower --held-out or embed more")

    def open_batches(order: Order, cursor: Cursor) -> CachedBatches:
        return CachedBatches(
            data.store,
            annotator,
            order,
            batch_size=cfg.batch_size,
            levels=data.levels,
            ranks=ranks,
            threads=cfg.threads,
            keep=cfg.accumulation,
            pin=device.type == "cuda",
            cursor=cursor,
        )

    exam, exam_rows = open_exam(cfg, data)
    if len(exam_rows):
        exam.say_what_is_scored()
    record = describe(data, exam.view, top, precision)
    # Without these it starts from the store's base weights, which have no head.
    files = {START: top_to_bytes(top)} if cfg.checkpoint or cfg.head == "hq" else {}
    course = Course("train-top", top, data, exam, exam_rows, open_batches, record, files)
    return train(cfg, course, device, precision, ranks)


def open_top(cfg: TrainTopConfig, data: CachedData) -> Top:
    """The store's base weights, or those of --checkpoint, with only the parts of --train free to move."""
    if cfg.head == "sam" and cfg.hq_output != "hq":
        raise UsageError(f"--hq-output {cfg.hq_output}: is for the HQ head; add --head hq")
    top, hq = top_from_bytes(data.store.base), hq_of(cfg)
    if cfg.checkpoint:
        top = load_top(top.size.name, cfg.checkpoint, top.size.input_size, hq)
    if hq and top.hq is None:
        where = f"{cfg.checkpoint} has no HQ head" if cfg.checkpoint else "the store has no HQ head to start from"
        say(f"{where}: a fresh one is drawn from --seed {cfg.seed}")
        top = add_head(top, hq, cfg.seed)
    choose_parts(cfg, cfg.train, top, adapter=False)
    return top


def hq_of(cfg: TrainTopConfig) -> HqOutput | None:
    """What the HQ head is to answer with, where one is asked for."""
    return cfg.hq_output if cfg.head == "hq" else None


def open_exam(cfg: TrainTopConfig, data: CachedData) -> tuple[CachedData, np.ndarray]:
    """The held-out rows, or all those of --eval-store."""
    if not cfg.eval_store:
        return data, data.held_out
    other = CachedData.open(
        cfg.eval_store,
        annotations=None,
        partial=cfg.partial,
        held_out=0,
        seed=cfg.seed,
        levels=levels_of(hq_of(cfg)),
        view=cfg.view,
    )
    other.check_encoder(data.store.spec.to_json(), str(cfg.store))
    return other, other.rows


def describe(data: CachedData, view: str, top: Top, precision: str) -> dict:
    """What the run is given, and the view it is scored on; `eval` takes its held-out images from here."""
    return {
        "stage": "train-top",
        "store": str(data.store.path.resolve()),
        "identity": data.store.spec.to_json(),
        "model": top.size.name,
        "hq": top.hq,
        "precision": precision,
        "view": view,
        "trained": list(dict.fromkeys(data.names(data.train))),  # an image once, however many views
        "held_out": data.names(data.held_out),
    }
