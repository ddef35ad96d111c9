"""Join a run's weights with their base into an official checkpoint, and prove it in upstream's package."""

import os

from sam_cache import durable
from sam_cache.batches import Preprocessing
from sam_cache.config import ExportConfig
from sam_cache.errors import CheckpointError, UsageError
from sam_cache.model import (
    check_suffix,
    compare_with_upstream,
    import_upstream,
    official_state,
    size_of,
    write_state,
)
from sam_cache.ranks import Ranks
from sam_cache.stages.device import pick_device
from sam_cache.stages.progress import say
from sam_cache.stages.tuned_sam import open_whole, preprocessing_of
from sam_cache.training import RunFolder

PACKAGES = {"sam": "segment_anything", "sam-hq": "segment_anything_hq"}


def export(cfg: ExportConfig) -> int:
    """Write `--out` once upstream's package answers from it as we do; returns 0.

    Raises UsageError for an adapter that cannot become plain weights and for a format that the run is not of,
    CheckpointError where the answers differ or the package is not there. Nothing is left at `--out` then but
    what was there before.
    """
    check_suffix(cfg.out)
    device = pick_device(cfg.device, Ranks.from_env())
    run, package = RunFolder.open(cfg.run), PACKAGES[cfg.format]
    fitting = "sam-hq" if run.read_json("record.json").get("hq") else "sam"
    if cfg.format != fitting:
        has = "has the HQ head" if fitting == "sam-hq" else "was trained without the HQ head"
        raise UsageError(f"--format {cfg.format}: {cfg.run} {has}; use --format {fitting}")
    import_upstream(hq=cfg.format == "sam-hq")  # without it nothing could be proved
    official = Preprocessing(size_of(run.read_json("record.json")["model"]).input_size)
    sam = open_whole(run, cfg.which, cfg.checkpoint, official)
    state = official_state(sam)
    warn(run, cfg.which, official, package)

    cfg.out.parent.mkdir(parents=True, exist_ok=True)
    aside = cfg.out.with_name(f".{cfg.out.stem}.{os.getpid()}.writing{cfg.out.suffix}")
    try:
        write_state(aside, state)
        say(f"{cfg.out}: giving {package} and samcache the same prompts, on {device}")
        found = compare_with_upstream(sam.to(device).eval(), aside)
        told = f"largest logit difference {found.difference:.1e} (standard deviation {found.deviation:.2g})"
        if not found.holds:
            raise CheckpointError(
                f"{cfg.out}: not written, {package} answers otherwise from it: {told}; "
                "try --device cpu, and report it where that does not help"
            )
        durable.fsync(aside)
        os.replace(aside, cfg.out)
        durable.fsync(cfg.out.parent)
    finally:
        aside.unlink(missing_ok=True)
    print(f"{cfg.out}: loads in {package}; {told}")
    return 0


def warn(run: RunFolder, which: str, official: Preprocessing, package: str) -> None:
    """Say what the file cannot carry: pixels made otherwise than the package does, stretched tables."""
    how = preprocessing_of(run)
    # Both ways to resize give nearly the same bytes.
    differing = [name for name in ("input_size", "fit", "normalise", "intensity")
                 if getattr(how, name) != getattr(official, name)]  # fmt: skip
    if differing:
        trained = ", ".join(f"{name} {getattr(how, name)}" for name in differing)
        usual = ", ".join(f"{name} {getattr(official, name)}" for name in differing)
        say(f"{run.path}: trained with {trained}; {package} has {usual}, so masks may be worse there")
    if how.input_size != official.input_size and "image_encoder.vit.pos_embed" in run.load_weights(which):
        say(
            f"{run.path}: its position tables, trained for input size {how.input_size}, are stretched back to "
            f"{official.input_size}, which is not exact"
        )
