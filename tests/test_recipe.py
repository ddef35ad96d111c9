from pathlib import Path

import pytest

from sam_cache import recipe
from sam_cache.errors import UsageError

PIPELINES = Path(__file__).parents[1] / "pipelines"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted(PIPELINES.glob("*.toml")), ids=lambda path: path.stem)
def test_packaged_recipes_resolve_and_open_with_their_command(path):
    assert recipe.find(path.stem) == path
    assert recipe.plan(path, None, [])
    first, *_ = path.read_text().splitlines()
    assert first.startswith(f"# samcache run {path.stem}")
    for word in ("Hardware", "Time", "Store", "Expected"):
        assert f"# {word}" in path.read_text(), f"{path.name} does not state its {word.lower()}"


def test_shared_values_go_where_they_are_known(tmp_path):
    path = write(tmp_path / "r.toml", '[shared]\nstore = "s.zarr"\nseed = 7\n[embed]\n[train-top]\nseed = 8\n')
    (_, embed), (_, train) = recipe.plan(path, Path("data"), ["train-top.steps=5", "embed.model=nano"])
    assert (str(embed.store), str(embed.root), embed.model) == ("s.zarr", "data", "nano")
    assert (train.seed, train.steps) == (8, 5)


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("[embde]\n", [], r"unknown stage \[embde\]"),
        ("[embed]\nmodle = 'nano'\n", [], "did you mean 'model'"),
        ("[embed]\n", ["embed.model"], "expected STAGE.FIELD=VALUE"),
        ("[embed]\n", ["eval.seed=1"], r"no stage \[eval\]"),
        ("[embed\n", [], "not TOML"),
    ],
)
def test_misfits_are_usage_errors(tmp_path, text, settings, message):
    with pytest.raises(UsageError, match=message):
        recipe.plan(write(tmp_path / "r.toml", text), None, settings)


def test_unknown_start_stage(tmp_path):
    path = write(tmp_path / "r.toml", "[embed]\n")
    with pytest.raises(UsageError, match="--from nowhere"):
        recipe.run(str(path), root=None, settings=[], start="nowhere", dry_run=True)
