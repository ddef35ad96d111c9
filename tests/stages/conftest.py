import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from sam_cache import cli


@pytest.fixture(scope="session")
def invoke() -> Callable[..., int]:
    """Runs a command in this process and returns its exit code."""

    def run(*arguments: object) -> int:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        return ended.value.code or 0

    return run


@pytest.fixture
def samcache(invoke, tmp_path, monkeypatch) -> Callable[..., int]:
    """Runs a command in an empty folder and returns its exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAMCACHE_HOME", str(tmp_path / "home"))
    return invoke


@pytest.fixture(scope="session")
def scenes_with(invoke, tmp_path_factory) -> Callable[..., Path]:
    """Finished stores of 12 synthetic scenes, embedded by the tiny model with these options. Read only."""
    made: dict[tuple, Path] = {}

    def scenes_with(*options: object) -> Path:
        if options not in made:
            path = tmp_path_factory.mktemp("scenes") / "scenes.zarr"
            assert invoke("embed", "--dataset", "synthetic", "--scenes", 12, "--model", "tiny", "--shard-rows", 4,
                          "--batch-size", 2, "--store", path, *options) == 0  # fmt: skip
            made[options] = path
        return made[options]

    return scenes_with


@pytest.fixture(scope="session")
def scenes(scenes_with) -> Path:
    """A finished store of 12 synthetic scenes, embedded by the tiny model. Read only."""
    return scenes_with()


@pytest.fixture(scope="session")
def forking_program() -> Iterator[subprocess.Popen]:
    program = str(Path(__file__).with_name("forked_commands.py"))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield process
        process.stdin.close()


@dataclass(frozen=True)
class Ended:
    """One process of a command: its exit code, negative for a signal, and what it printed."""

    code: int
    said: str


class Launcher:
    """Runs commands in processes of their own, in `folder`."""

    def __init__(self, program: subprocess.Popen, folder: Path):
        self.folder = folder
        self._program = program

    def __call__(self, *arguments: object, ranks: int = 1, faults: Sequence[dict] = ()) -> list[Ended]:
        """In `ranks` processes; `faults` as in forked_commands.py."""
        asked = {"arguments": list(map(str, arguments)), "folder": str(self.folder), "ranks": ranks, "faults": faults}
        self._program.stdin.write(json.dumps(asked) + "\n")
        self._program.stdin.flush()
        codes = json.loads(self._program.stdout.readline())
        return [Ended(code, (self.folder / f"said-{rank}.txt").read_text()) for rank, code in enumerate(codes)]

    def train(self, command: Sequence, out: Path | str, *, ranks: int = 1, faults: Sequence[dict] = ()) -> list[int]:
        """Start the run `out`, or go on with it where there is one; returns the exit codes."""
        resume = ("--resume",) if (self.folder / out / "config.json").exists() else ()
        return [ended.code for ended in self(*command, "--out", out, *resume, ranks=ranks, faults=faults)]


@pytest.fixture
def launch(forking_program, tmp_path) -> Launcher:
    return Launcher(forking_program, tmp_path)


@pytest.fixture(scope="session")
def launch_in(forking_program) -> Callable[[Path], Launcher]:
    return lambda folder: Launcher(forking_program, folder)
