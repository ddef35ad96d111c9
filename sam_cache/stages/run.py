"""Opening the folder of a training: a new one, or one that goes on."""

import time
from pathlib import Path

from sam_cache.config import TrainingKnobs, resolve, with_absolute_paths
from sam_cache.errors import UsageError
from sam_cache.training import RunFolder

# What may change when a run goes on; everything else would make it another run.
FREE = {
    "resume",
    "out",
    "steps",
    "epochs",
    "device",
    "threads",
    "mask_budget",
    "save_every",
    "partial",
    "checkpointing",
}
FREE |= {"evaluate_every", "evaluate_images", "eval_store", "patience", "best_by", "pictures", "trackers"}


def start_run(cfg: TrainingKnobs, stage: str, record: dict, files: dict[str, bytes]) -> RunFolder:
    """A new run folder with its configuration, `record` and `files` by name."""
    run = RunFolder.create(cfg.out or Path(f"runs/{stage}-{time.strftime('%Y%m%d-%H%M%S')}"))
    for name, content in files.items():
        (run.path / name).write_bytes(content)
    run.write_json("record.json", record)
    run.write_json("config.json", with_absolute_paths(cfg).model_dump(mode="json", by_alias=True))
    return run


def continue_run(cfg: TrainingKnobs, record: dict) -> RunFolder:
    """The run in --out, if it is still the same. Raises UsageError naming what differs."""
    if cfg.out is None:
        raise UsageError("--resume: say which run with --out")
    run = RunFolder.open(cfg.out)
    written = resolve(type(cfg), run.read_json("config.json"), str(run.path / "config.json"))
    before, now = (found.model_dump(mode="json", by_alias=True) for found in (written, with_absolute_paths(cfg)))
    differing = [f"{name} was {before.get(name)!r}, is {now[name]!r}" for name in now
                 if name not in FREE and before.get(name) != now[name]]  # fmt: skip
    old = run.read_json("record.json")
    differing += [f"{name} of the data changed" for name in ("identity", "trained", "held_out")
                  if old[name] != record[name]]  # fmt: skip
    if differing:
        raise UsageError(f"--resume: {cfg.out} is another run: {'; '.join(differing)}; choose another --out")
    run.write_json("config.json", now)
    return run
