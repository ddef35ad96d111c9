import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sam_cache import cli


@pytest.fixture
def samcache(tmp_path, monkeypatch) -> Callable[..., int]:
    """Runs a command in an empty folder and returns its exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAMCACHE_HOME", str(tmp_path / "home"))

    def run(*arguments: object) -> int:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        return ended.value.code or 0

    return run


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """A finished store of 12 synthetic scenes, embedded by the tiny model. Read only."""
    path = tmp_path_factory.mktemp("scenes") / "scenes.zarr"
    with pytest.raises(SystemExit) as ended:
        cli.main(
            ["embed", "--dataset", "synthetic", "--scenes", "12", "--model", "tiny", "--shard-rows", "4",
             "--batch-size", "2", "--store", str(path)]
        )  # fmt: skip
    assert not ended.value.code
    return path


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


@pytest.fixture
def launch(forking_program, tmp_path) -> Callable[..., list[Ended]]:
    """Runs a command in `ranks` processes of their own, in the test's folder; `faults` as in forked_commands.py."""

    def run(*arguments: object, ranks: int = 1, faults: tuple[dict, ...] = ()) -> list[Ended]:
        asked = {"arguments": list(map(str, arguments)), "folder": str(tmp_path), "ranks": ranks, "faults": faults}
        forking_program.stdin.write(json.dumps(asked) + "\n")
        forking_program.stdin.flush()
        codes = json.loads(forking_program.stdout.readline())
        return [Ended(code, (tmp_path / f"said-{rank}.txt").read_text()) for rank, code in enumerate(codes)]

    run.folder = tmp_path
    return run
