"""The networks behind a run: the base weights it started from, and what it made of them."""

from pathlib import Path

from sam_cache.config import AdapterKnobs, TrainFullConfig, TrainTopConfig
from sam_cache.errors import CheckpointError
from sam_cache.model import AdapterKnobs as ModelAdapterKnobs
from sam_cache.model import LoraKnobs, Sam, SamAdapterKnobs, SpatialPriorKnobs, Top, attach, load_sam, top_from_bytes
from sam_cache.stages.embedding_store import checkpoint_of
from sam_cache.store import EmbeddingStore
from sam_cache.training import RunFolder, load_trained

START = "start.safetensors"  # in a run folder: the whole top that training started from, where it is not the store's


def adapter_knobs(cfg: AdapterKnobs) -> ModelAdapterKnobs | None:
    """The adapter that is asked for, with its own knobs."""
    match cfg.adapter:
        case "sa":
            return SamAdapterKnobs(
                cfg.sa_variant,
                cfg.sa_scale_factor,
                cfg.sa_tune_width,
                cfg.sa_bottleneck,
                cfg.sa_mask_ratio,
                cfg.sa_start,
            )
        case "lora":
            return LoraKnobs(cfg.lora_rank, cfg.lora_alpha, cfg.lora_targets, cfg.lora_from_block)
        case "spm":
            return SpatialPriorKnobs(cfg.spm_rank, cfg.spm_channels, cfg.spm_backbone)
    return None


def stage_of(run: RunFolder) -> str:
    """`train-top` or `train-full`."""
    return run.read_json("record.json")["stage"]


def config_of(run: RunFolder) -> TrainTopConfig | TrainFullConfig:
    """The configuration a run was started with."""
    model = TrainTopConfig if stage_of(run) == "train-top" else TrainFullConfig
    return model(**run.read_json("config.json"))


def open_base(run: RunFolder, checkpoint: Path | None) -> Sam:
    """The whole SAM that a run of train-full started from.

    `checkpoint` stands in for the file of its configuration. Raises CheckpointError unless it holds the
    same encoder.
    """
    cfg, record = config_of(run), run.read_json("record.json")
    path = checkpoint or checkpoint_of(cfg)
    sam = load_sam(cfg.model, path, cfg.input_size, cfg.normalise)
    check_encoder(sam, record["identity"]["encoder"], str(run.path), path)
    return sam


def check_encoder(sam: Sam, digest: str, owner: str, path: Path | None) -> None:
    """Raises CheckpointError where `sam` has another encoder than the one whose digest is given."""
    if sam.image_encoder.digest != digest:
        raise CheckpointError(
            f"{path or sam.size.name}: its encoder is not the one {owner} was trained with "
            f"({sam.image_encoder.digest[:12]} != {digest[:12]}); name that file with --checkpoint"
        )


def open_tuned(run: RunFolder, which: str, checkpoint: Path | None = None) -> Sam:
    """The whole network of a run of train-full, with its trained parameters."""
    sam = open_base(run, checkpoint)
    cfg = config_of(run)
    knobs = adapter_knobs(cfg)
    if knobs is not None:
        # The backbone's weights are among the trained ones: its file is not needed again.
        attach(
            sam.image_encoder,
            SpatialPriorKnobs(cfg.spm_rank, cfg.spm_channels) if cfg.adapter == "spm" else knobs,
            cfg.seed,
        )
    load_trained(sam, run.load_weights(which), str(run.path))
    return sam


def open_tuned_top(run: RunFolder, which: str, store: EmbeddingStore | None = None) -> Top:
    """The top of a run of train-top; what it did not train is its start's, or the store's."""
    start = run.path / START
    if start.exists():
        blob = start.read_bytes()
    else:
        blob = (store or EmbeddingStore.open(Path(run.read_json("record.json")["store"]))).base
    top = top_from_bytes(blob)
    load_trained(top, run.load_weights(which), str(run.path))
    return top
