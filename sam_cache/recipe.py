"""A recipe: a TOML file whose tables are the stages to run, in order.

`[shared]` holds values for every stage that knows the key. A stage whose configuration and inputs are
those of its last success is skipped; a receipt beside its output says so.
"""

import hashlib
import importlib
import json
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from sam_cache import __version__
from sam_cache.config import (
    CalibrateConfig,
    EmbedConfig,
    EvalConfig,
    ExportConfig,
    InfoConfig,
    PredictConfig,
    StageConfig,
    TrainFullConfig,
    TrainingKnobs,
    TrainTopConfig,
    VerifyConfig,
    resolve,
    with_absolute_paths,
)
from sam_cache.errors import UsageError
from sam_cache.ranks import Ranks


@dataclass(frozen=True)
class Stage:
    name: str
    config: type[StageConfig]
    program: str
    help: str

    def load(self) -> Callable[[Any], int | None]:
        module, function = self.program.split(":")
        return getattr(importlib.import_module(f"sam_cache.stages.{module}"), function)


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "embed",
            EmbedConfig,
            "embed:embed",
            "Run the frozen image encoder once over every image, into a store.",
        ),
        Stage(
            "verify",
            VerifyConfig,
            "verify:verify_store",
            "Check a store's bytes against its ledger and checksums.",
        ),
        Stage("info", InfoConfig, "info:info", "Describe a store: identity, rows, objects, bytes."),
        Stage(
            "calibrate",
            CalibrateConfig,
            "calibrate:calibrate",
            "Measure what storage types and codecs cost with your weights and images, and name the smallest.",
        ),
        Stage(
            "train-top",
            TrainTopConfig,
            "train_top:train_top",
            "Train prompt encoder and mask decoder from a store.",
        ),
        Stage(
            "train-full",
            TrainFullConfig,
            "train_full:train_full",
            "Train end to end from images: adapters in the encoder, or any part of the network.",
        ),
        Stage(
            "eval",
            EvalConfig,
            "evaluate:evaluate",
            "Score a run beside untouched SAM, per prompt kind and size.",
        ),
        Stage(
            "export",
            ExportConfig,
            "export:export",
            "Join a run's weights with their base into an official checkpoint, and check it.",
        ),
        Stage(
            "predict",
            PredictConfig,
            "predict:predict",
            "Segment a folder of images with a run: COCO JSON and PNG masks.",
        ),
    )
}


READS_A_DATASET = {"embed", "calibrate", "train-full"}  # what --root is for


def find(name: str) -> Path:
    """A path where `name` has a slash or ends in .toml, else the packaged recipe of that name."""
    if "/" in name or name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise UsageError(f"{name}: no such recipe file; a packaged recipe is named without slash and .toml")
        return path
    folders = [Path(str(files("sam_cache") / "pipelines")), Path(__file__).resolve().parents[1] / "pipelines"]
    packaged = {path.stem: path for folder in folders for path in sorted(folder.glob("*.toml"))}
    if name not in packaged:
        raise UsageError(f"no recipe {name!r}; packaged are {', '.join(sorted(packaged))}; a file is named by its path")
    return packaged[name]


def plan(path: Path, root: Path | None, settings: list[str]) -> list[tuple[Stage, StageConfig]]:
    """The recipe's stages with their resolved configurations, in order."""
    try:
        tables = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: not TOML: {error}") from None
    if loose := [name for name, table in tables.items() if not isinstance(table, dict)]:
        raise UsageError(f"{path}: {loose[0]} stands outside of a stage; write it under [shared] or [STAGE]")
    shared = tables.pop("shared", {})
    if unknown := [name for name in tables if name not in STAGES]:
        raise UsageError(f"{path}: unknown stage [{unknown[0]}]; stages are {', '.join(STAGES)}")
    for name, key, value in map(_parse_setting, settings):
        if name not in tables:
            raise UsageError(f"--set {name}.{key}: {path.name} has no stage [{name}]; it has {', '.join(tables)}")
        tables[name][key] = value
    for name in READS_A_DATASET & tables.keys() if root is not None else ():
        tables[name]["root"] = str(root)
    known = {key for name in tables for key in _shared_with(STAGES[name], shared)}
    if unknown := [key for key in shared if key not in known]:
        raise UsageError(f"{path.name} [shared]: no stage of this recipe knows the key {unknown[0]!r}")
    return [
        (
            STAGES[name],
            resolve(STAGES[name].config, _shared_with(STAGES[name], shared) | table, f"{path.name} [{name}]"),
        )
        for name, table in tables.items()
    ]


def _shared_with(stage: Stage, shared: dict[str, Any]) -> dict[str, Any]:
    known = {field.alias or name for name, field in stage.config.model_fields.items()}
    return {key: value for key, value in shared.items() if key in known}


def _parse_setting(text: str) -> tuple[str, str, Any]:
    target, equals, value = text.partition("=")
    stage, dot, key = target.partition(".")
    if not (equals and dot and key):
        raise UsageError(f"--set {text}: expected STAGE.FIELD=VALUE, such as train-top.steps=100")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value  # a bare word is a string
    return stage, key.replace("-", "_"), parsed


def run(name: str, *, root: Path | None, settings: list[str], start: str | None, dry_run: bool) -> int:
    """Run a recipe; returns the exit code of the first stage that does not end with 0."""
    if (world := Ranks.from_env().world) > 1:
        raise UsageError(f"WORLD_SIZE={world}: a recipe runs in one process; start its stages with torchrun instead")
    path = find(name)
    stages = plan(path, root, settings)
    names = [stage.name for stage, _ in stages]
    if start is not None and start not in names:
        raise UsageError(f"--from {start}: {path.name} has the stages {', '.join(names)}")
    first = names.index(start) if start else 0
    for number, (stage, cfg) in enumerate(stages):
        heading = f"[{number + 1}/{len(stages)}] {stage.name}"
        receipt = Receipt.of(path.stem, stage, cfg)
        if number < first:
            print(f"{heading}: before --from {start}, left alone", file=sys.stderr)
        elif dry_run:
            print(f"{heading}: {cfg.model_dump_json(exclude_defaults=True, by_alias=True)}")
        elif start is None and receipt.holds():
            print(f"{heading}: up to date, skipped", file=sys.stderr)
        else:
            print(f"{heading}", file=sys.stderr)
            if isinstance(cfg, TrainingKnobs):
                cfg = _continue_or_redo(cfg, ended_before=receipt.path.exists() or start is not None)
            receipt.path.unlink(missing_ok=True)
            if code := stage.load()(cfg) or 0:
                return code
            Receipt.of(path.stem, stage, cfg).write()
    return 0


def _continue_or_redo(cfg: TrainingKnobs, ended_before: bool) -> TrainingKnobs:
    """A run that was interrupted goes on; one that ended, or was configured otherwise, is put aside."""
    written = cfg.out / "config.json" if cfg.out else None
    if written is None or not written.exists():
        return cfg
    resumed = with_absolute_paths(cfg.model_copy(update={"resume": True}))
    before = resolve(type(cfg), json.loads(written.read_text()) | {"resume": True}, str(written))
    if not ended_before and before == resumed:
        return resumed
    aside = cfg.out.with_name(f"{cfg.out.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    cfg.out.rename(aside)
    print(f"{cfg.out}: the run there is outdated, kept as {aside}", file=sys.stderr)
    return cfg


@dataclass(frozen=True)
class Receipt:
    """Says of a stage: with this configuration, these inputs and this version it has ended well."""

    path: Path
    output: Path | None
    fingerprint: str

    @classmethod
    def of(cls, recipe: str, stage: Stage, cfg: StageConfig) -> "Receipt":
        folder = Path("runs") / recipe
        knobs = cfg.model_dump_json(exclude={"resume"})  # going on is the same run
        digest = hashlib.sha256(f"{__version__} {stage.name} {knobs}".encode())
        # Training writes the run that evaluation reads, embedding writes the store that all others read:
        # an input is what is read only, so that a stage's own output does not outdate it.
        # A dataset's images are not read for this: say --from where they have changed.
        inputs = {
            "embed": (),
            "calibrate": ("checkpoint",),
            "train-full": ("checkpoint",),
            "train-top": ("store", "eval_store", "annotations", "checkpoint"),
        }
        for field in inputs.get(stage.name, ("store", "run", "annotations", "checkpoint", "boxes")):
            if (source := getattr(cfg, field, None)) is not None:
                digest.update(_fingerprint(source).encode())
        return cls(folder / f"{stage.name}.receipt.json", getattr(cfg, "out", None), digest.hexdigest())

    def holds(self) -> bool:
        # Embedding knows by itself which rows are missing, and says so quicker than a receipt could.
        if self.path.name.startswith("embed") or not self.path.is_file():
            return False
        written = json.loads(self.path.read_text())["fingerprint"] == self.fingerprint
        return written and (self.output is None or self.output.exists())

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({"fingerprint": self.fingerprint}) + "\n")


def _fingerprint(source: Path) -> str:
    """What a store or run holds, by the content of its ledger or its weights; a file by its own content."""
    if not source.exists():
        return "absent"
    kept = [source] if source.is_file() else sorted([*source.glob("ledger/*.json"), *source.glob("**/*.safetensors")])
    digest = hashlib.sha256()
    for path in kept:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
