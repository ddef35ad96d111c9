import json
import subprocess
import sys

import pytest

from sam_cache import cli
from sam_cache.recipe import STAGES


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "sam_cache", *arguments], capture_output=True, text=True, **options)


def imported_by(code: str) -> set[str]:
    script = f"import json, sys\n{code}\nprint(json.dumps(list(sys.modules)))"
    return set(json.loads(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout))


def test_the_command_line_imports_no_torch():
    assert not {"torch", "zarr", "cv2"} & imported_by("import sam_cache.cli")


@pytest.mark.parametrize("arguments", [["--help"], ["embed", "--help"], ["train-top", "--help"]])
def test_help_imports_neither_torch_nor_any_library_of_the_stages(arguments):
    quietly = "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(None): cli.main"
    modules = imported_by(f"import contextlib\nfrom sam_cache import cli\n{quietly}({arguments})")
    assert "sam_cache.cli" in modules
    assert not {"torch", "zarr", "cv2", "numpy", "msgspec", "rich"} & modules


def test_an_import_of_torch_would_be_seen():
    assert "torch" in imported_by("import sam_cache.cli, torch")


@pytest.mark.parametrize("stage", list(STAGES))
def test_every_field_is_a_flag_in_the_help(stage):
    text = run(stage, "--help", env={"COLUMNS": "300", "PATH": ""}).stdout
    for name, field in STAGES[stage].config.model_fields.items():
        assert "--" + (field.alias or name).replace("_", "-") in text


def test_exit_code_2_for_usage():
    for arguments in (
        ["embed", "--bogus"],
        ["embed", "--batch-size", "0"],
        ["run", "no-such-recipe"],
        ["run", "a/b.toml"],
    ):
        assert run(*arguments).returncode == 2, arguments


def test_exit_code_1_and_one_line_for_what_is_missing(tmp_path):
    ended = run("train-top", "--store", str(tmp_path / "none.zarr"))
    assert ended.returncode == 1
    assert len(ended.stderr.strip().splitlines()) == 1
    assert "none.zarr" in ended.stderr


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert "torch" in capsys.readouterr().out
