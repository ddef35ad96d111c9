from collections.abc import Callable
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
