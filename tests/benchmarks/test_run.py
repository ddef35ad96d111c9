"""The README of the benchmarks says what the results say, and nothing by hand."""

import json

import pytest

MACHINE = {
    "processor": "a processor",
    "cores": 2,
    "gpu": None,
    "python": "3.11.7",
    "versions": {"torch": "2.15.0", "zarr": "3.1.6"},
    "commit": "abc1234",
    "date": "2026-11-21",
}


@pytest.fixture
def run(program):
    return program("run")


def test_the_committed_readmes_are_what_the_committed_results_render(run):
    for readme, way in run.READMES.items():
        assert run.render(readme.read_text(), way) == readme.read_text()


def test_the_charts_that_are_there_are_those_the_readme_shows(run):
    text = (run.HERE / "README.md").read_text()
    shown = {*run.re.findall(r"\]\((charts/[\w.]+)\)", text)}
    assert shown == {f"charts/{path.name}" for path in (run.HERE / "charts").glob("*")}


def test_every_result_has_a_place_in_the_readme(run):
    placed = {name for _, name, *_ in run.BLOCK.findall((run.HERE / "README.md").read_text())}
    assert {path.stem for path in run.RESULTS.glob("*.json")} <= placed


def test_a_block_without_a_result_says_so(run, tmp_path):
    text = "<!-- growth_cuda: growth.render -->\nold\n<!-- end -->"
    assert "Not measured on GPU." in run.render(text, results=tmp_path)


def test_a_block_is_made_anew_from_its_result_alone(run, tmp_path):
    plans = [{"model": "vit_b", "adapter": "sa", "bytes": {"checkpointing": 2**30, "without": 3 * 2**30}}]
    (tmp_path / "memory_plan.json").write_text(json.dumps({"plans": plans, "machine": MACHINE}))
    text = "before\n<!-- memory_plan: memory_plan.render -->\nold\n<!-- end -->\nafter"
    rendered = run.render(text, results=tmp_path)
    assert "| vit_b | `--adapter sa` | 1.0 GiB | 3.0 GiB |" in rendered
    assert "commit abc1234" in rendered
    assert "old" not in rendered
    assert rendered.startswith("before\n")
    assert rendered.endswith("\nafter")
    assert run.render(rendered, results=tmp_path) == rendered


def test_every_program_that_run_names_is_there(run):
    for name in run.ON_CPU | run.ON_GPU | run.WITH_DATA:
        assert (run.HERE / f"{name}.py").exists(), name
