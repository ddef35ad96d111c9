import importlib.util
import re
from pathlib import Path

import sam_cache
from sam_cache.recipe import STAGES

ROOT = Path(__file__).parents[1]


def test_all_public_names_exist():
    for name in sam_cache.__all__:
        assert getattr(sam_cache, name).__name__ == name


def test_readme_names_every_command_and_recipe():
    readme = (ROOT / "README.md").read_text()
    for stage in STAGES:
        assert f"samcache {stage}" in readme
    recipes = (ROOT / "pipelines" / "README.md").read_text()
    for recipe in (ROOT / "pipelines").glob("*.toml"):
        assert f"`{recipe.stem}`" in recipes


def test_custom_dataset_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    specification = importlib.util.spec_from_file_location("custom_dataset", ROOT / "pipelines" / "custom_dataset.py")
    example = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(example)
    example.main(tmp_path / "out", model="tiny", steps=2)
    assert (tmp_path / "out" / "eval" / "report.json").exists()


def test_no_placeholder_is_left_in_what_people_read():
    for path in [ROOT / "README.md", *(ROOT / "pipelines").glob("*"), *(ROOT / "benchmarks").glob("*.md")]:
        if path.is_file():
            assert not re.findall(r"@[A-Z]+@", path.read_text()), path
