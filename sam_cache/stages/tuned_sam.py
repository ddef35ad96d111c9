"""The networks behind a run: the base weights it started from, and what it made of them."""

from pathlib import Path

from sam_cache.batches import Preprocessing
from sam_cache.config import AdapterKnobs, ModelKnobs, TrainFullConfig, TrainTopConfig
from sam_cache.errors import CheckpointError
from sam_cache.model import AdapterKnobs as ModelAdapterKnobs
from sam_cache.model import (
    HqOutput,
    LoraKnobs,
    Sam,
    SamAdapterKnobs,
    SpatialPriorKnobs,
    Top,
    attach,
    fit_trained,
    load_sam,
    state_digest,
    top_from_bytes,
)
from sam_cache.stages.embedding_store import checkpoint_of
from sam_cache.stages.progress import say
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


def preprocessing_of(run: RunFolder) -> Preprocessing:
    """How the images of a run became pixels: for train-top those of its store, by the store's identity."""
    record = run.read_json("record.json")
    if stage_of(run) == "train-top":
        return Preprocessing(**record["identity"]["preprocessing"])
    cfg = config_of(run)
    return Preprocessing(record["input_size"], cfg.fit, cfg.normalise, cfg.resize, cfg.intensity)


def open_base(run: RunFolder, checkpoint: Path | None, how: Preprocessing | None = None) -> Sam:
    """The whole SAM whose encoder a run started from; for train-top that is the encoder of its store.

    `checkpoint` stands in for the file of its configuration, which for train-top is the model's official
    one. `how` gives another input size and normalisation than the run's own. Raises CheckpointError unless
    the file holds the same encoder.
    """
    record, how = run.read_json("record.json"), how or preprocessing_of(run)
    if stage_of(run) == "train-top":
        # The run's own --checkpoint is where its top started; its store's encoder came from elsewhere.
        path = checkpoint_of(ModelKnobs(model=record["model"], checkpoint=checkpoint))
        digest = record["identity"]["encoder_sha256"]
    else:
        path = checkpoint or checkpoint_of(config_of(run))
        digest = record["identity"]["encoder"]
    sam = load_sam(record["model"], path, how.input_size, how.normalise, record.get("hq"))
    check_encoder(sam, digest, str(run.path), path)
    if stage_of(run) == "train-full" and digest_of_top(sam) != record["identity"]["top"]:
        raise CheckpointError(
            f"{path or sam.size.name}: its prompt encoder or mask decoder is not the one {run.path} started from; "
            "name that file with --checkpoint"
        )
    return sam


def digest_of_top(sam: Sam) -> str:
    """sha256 of all that is not the encoder, as it was loaded."""
    return state_digest({key: value for key, value in sam.state_dict().items() if not key.startswith("image_encoder.")})


def check_encoder(sam: Sam, digest: str, owner: str, path: Path | None) -> None:
    """Raises CheckpointError where `sam` has another encoder than the one whose digest is given."""
    if sam.image_encoder.digest != digest:
        raise CheckpointError(
            f"{path or sam.size.name}: its encoder is not the one {owner} was trained with "
            f"({sam.image_encoder.digest[:12]} != {digest[:12]}); name that file with --checkpoint"
        )


def open_tuned(run: RunFolder, which: str, checkpoint: Path | None = None, how: Preprocessing | None = None) -> Sam:
    """The whole network of a run of train-full, with its trained parameters; arguments as for `open_base`."""
    sam = open_base(run, checkpoint, how)
    cfg = config_of(run)
    knobs = adapter_knobs(cfg)
    if knobs is not None:
        # The backbone's weights are among the trained ones: its file is not needed again.
        attach(
            sam.image_encoder,
            SpatialPriorKnobs(cfg.spm_rank, cfg.spm_channels) if cfg.adapter == "spm" else knobs,
            cfg.seed,
        )
    load_trained(sam, fit_trained(run.load_weights(which), sam.size), str(run.path))
    return sam


def open_whole(run: RunFolder, which: str, checkpoint: Path | None = None, how: Preprocessing | None = None) -> Sam:
    """The whole network of a run of either training, encoder and top; arguments as for `open_base`."""
    if stage_of(run) == "train-full":
        return open_tuned(run, which, checkpoint, how)
    sam = open_base(run, checkpoint, how)
    store = Path(run.read_json("record.json")["store"])
    if (run.path / START).exists() or store.exists():
        top = open_tuned_top(run, which)
        sam.prompt_encoder.load_state_dict(top.prompt_encoder.state_dict())
        sam.mask_decoder.load_state_dict(top.mask_decoder.state_dict())
    else:
        # The store's base weights were those of the file that its encoder came from.
        say(f"{store}: no longer there; what {run.path} did not train is taken from the file of the encoder")
        load_trained(sam, run.load_weights(which), str(run.path))
    return sam


def open_tuned_top(
    run: RunFolder, which: str, store: EmbeddingStore | None = None, hq_output: HqOutput | None = None
) -> Top:
    """The top of a run of train-top; what it did not train is its start's, or the store's.

    `hq_output` says what its HQ head, if it has one, answers with instead of what it was trained with.
    """
    start = run.path / START
    if start.exists():
        blob = start.read_bytes()
    else:
        blob = (store or EmbeddingStore.open(Path(run.read_json("record.json")["store"]))).base
    top = top_from_bytes(blob)
    load_trained(top, run.load_weights(which), str(run.path))
    if hq_output and top.hq:
        top.hq = hq_output
    return top
