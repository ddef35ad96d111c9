"""What every configuration is made of: its types, and how values become one."""

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
Stored = Literal["fp16", "fp32", "bf16", "int8"]
HqOutput = Literal["hq", "sum"]


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
    # Built when a command runs: --help needs the fields of all stages and validates none.
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, defer_build=True)


def _with_absolute_folders(entry: str) -> str:
    name, _, folders = entry.partition("=")
    return name + "=" + ":".join(str(Path(folder).absolute()) for folder in folders.split(":"))


def with_absolute_paths(cfg: Config) -> Config:
    """The same, readable from any folder. What is relative to --root stays so; where things are written, too."""
    beside_root = {"images", "annotations", "masks"} if getattr(cfg, "root", None) else set()
    paths = {name: value for name, value in cfg if isinstance(value, Path) and name not in {"out", *beside_root}}
    absolute: dict[str, Any] = {name: path.absolute() for name, path in paths.items()}
    for name in () if getattr(cfg, "root", None) else ("pairs", "val_pairs"):
        if entries := getattr(cfg, name, None):
            absolute[name] = tuple(map(_with_absolute_folders, entries))
    return cfg.model_copy(update=absolute)


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
