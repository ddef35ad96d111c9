"""argv -> config -> stage -> exit code.

Commands are made from the config models: one field, one flag. Stages are imported when they run, so
`--help` needs no torch.
"""

import importlib.metadata
import inspect
import os
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sam_cache import __version__, config, recipe
from sam_cache.errors import SamcacheError, UsageError

# Damaged images are reported by name at the end; OpenCV's own lines would tear the progress bar.
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")

app = typer.Typer(
    name="samcache",
    help="Run SAM's frozen image encoder once; fine-tune the rest from its embeddings.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _parameter(name: str, field: Any) -> inspect.Parameter:
    """The command-line option of one config field; None when not given, so the config decides."""
    flag = "--" + (field.alias or name).replace("_", "-")
    kind = field.annotation
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    if typing.get_origin(kind) is Annotated:
        kind = typing.get_args(kind)[0]
    untold = field.default in (None, ()) or field.default_factory  # the description says what it is then
    default = "" if untold else f" [default: {_shown(field.default)}]"
    declarations = [f"{flag}/--no-{flag[2:]}"] if kind is bool else [flag]
    if kind not in (str, int, float, bool, Path) and typing.get_origin(kind) is not Literal:
        kind = str  # tuples are written with commas; the config model splits them
    option = typer.Option(*declarations, help=field.description + ("" if kind is bool else default), show_default=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _command(model: type[config.StageConfig], run: Callable[[Any], int | None]) -> Callable[..., None]:
    def command(**options: Any) -> None:
        given = {model.model_fields[name].alias or name: value for name, value in options.items() if value is not None}
        raise typer.Exit(run(config.resolve(model, given, "command line")) or 0)

    parameters = [_parameter(name, field) for name, field in model.model_fields.items()]
    command.__signature__ = inspect.Signature(parameters)
    return command


def _add_stage(stage: recipe.Stage) -> None:
    def run(cfg: config.StageConfig) -> int | None:
        return stage.load()(cfg)

    app.command(stage.name, help=stage.help)(_command(stage.config, run))


for _stage in recipe.STAGES.values():
    _add_stage(_stage)


@app.command("run")
def run_recipe(
    name: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A packaged recipe's name, or the path of a TOML file.")
    ],
    root: Annotated[Path | None, typer.Option(help="Dataset folder for the recipe's stages that read one.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="STAGE.FIELD=VALUE", help="Change one value; repeatable."),
    ] = None,
    start: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Start at this stage, redoing it.")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Print what would run and stop.")] = False,
) -> None:
    """Run the stages of a recipe, such as `samcache run quickstart`; what is up to date is skipped."""
    raise typer.Exit(recipe.run(name, root=root, settings=settings or [], start=start, dry_run=dry_run))


def _print_version(asked: bool) -> None:
    if asked:
        versions = [f"{package} {importlib.metadata.version(package)}" for package in ("torch", "zarr", "numpy")]
        typer.echo(f"samcache {__version__} (python {sys.version.split()[0]}, {', '.join(versions)})")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show versions.")
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `samcache` script; exits with 0, 1 error, 2 usage, 3 damage or 130 interrupted."""
    try:
        app(arguments)
    except UsageError as error:
        print(f"usage error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except SamcacheError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:  # a disk that is full, a path that is a file: the system's words say it
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; what was committed is kept", file=sys.stderr)
        sys.exit(130)
