import io
import json
import os
import struct
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from sam_cache.errors import UsageError
from sam_cache.training.precision import make_accelerator
from sam_cache.training.trackers import log_images

CPU = torch.device("cpu")
CONFIG = {"learning_rate": 1e-4, "steps": 7, "resume": False, "loss": "points", "milestones": [3, 5], "out": None}


@pytest.fixture
def offline_wandb(tmp_path, monkeypatch):
    """W&B as a user without an account has it, with nothing of it left behind."""
    wandb = pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    for name in ("HOME", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # else it would ask a developer at a terminal for a key
    yield wandb
    wandb.teardown()


def draw_pictures():
    generator = np.random.default_rng(0)
    return {
        "examples/one": generator.integers(0, 256, (5, 8, 3), dtype=np.uint8),
        "examples/dark and thin": generator.integers(0, 2, (1, 6, 3), dtype=np.uint8),
    }


def read_tensorboard(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0}).Reload()


def read_wandb(file: Path) -> list:
    """The records of an offline run: seven bytes of header, then LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    raw, place, whole, records = file.read_bytes(), 7, b"", []
    while place < len(raw):
        if (room := 32768 - place % 32768) < 7:  # no header fits: the rest of the block is empty
            place += room
            continue
        _, length, kind = struct.unpack_from("<IHB", raw, place)
        place += 7 + length
        whole += raw[place - length : place]
        if kind in (1, 4):  # a whole record, or the last piece of one
            records.append(Record.FromString(whole))
            whole = b""
    return records


def wandb_services() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if "wandb" in child.name()]


def log_a_run(accelerator):
    accelerator.log({"loss": 0.5, "held_out/score": 0.25}, step=3)
    log_images(accelerator, 3, draw_pictures())
    accelerator.log({"loss": 0.125}, step=4)


def test_tensorboard_holds_metrics_pictures_and_configuration(tmp_path):
    accelerator = make_accelerator(CPU, "fp32", tmp_path, config=CONFIG)
    log_a_run(accelerator)
    accelerator.end_training()

    events = read_tensorboard(tmp_path)
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 0.5), (4, 0.125)]
    assert [(event.step, event.value) for event in events.Scalars("held_out/score")] == [(3, 0.25)]
    for name, picture in draw_pictures().items():
        (event,) = events.Images(name)
        assert event.step == 3
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(event.encoded_image_string))), picture)
    start = HParamsPluginData.FromString(events.PluginTagToContent("hparams")["_hparams_/session_start_info"])
    shown = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.session_start_info.hparams.items()}
    assert shown == CONFIG | {"milestones": "[3, 5]", "out": "None"}
    assert [path.is_file() for path in (tmp_path / "tensorboard").iterdir()] == [True]


def test_offline_wandb_holds_metrics_pictures_and_configuration(tmp_path, offline_wandb):
    folder = tmp_path / "run-7"
    folder.mkdir()
    accelerator = make_accelerator(CPU, "fp32", folder, ("tensorboard", "wandb"), config=CONFIG)
    assert wandb_services()
    log_a_run(accelerator)
    accelerator.end_training()
    assert wandb_services() == []

    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    records = read_wandb(file)
    (run,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
    assert (run.project, run.display_name) == ("samcache", "run-7")
    updates = [run.config, *(record.config for record in records if record.WhichOneof("record_type") == "config")]
    stored = {item.key: json.loads(item.value_json) for update in updates for item in update.update}
    assert {name: stored[name] for name in CONFIG} == CONFIG

    rows = {}
    for record in records:
        if record.WhichOneof("record_type") == "history":
            row = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            rows[row["_step"]] = row
    assert (rows[3]["loss"], rows[3]["held_out/score"], rows[4]["loss"]) == (0.5, 0.25, 0.125)
    for name, picture in draw_pictures().items():
        (stored_at,) = rows[3][f"{name}.filenames"]
        assert np.array_equal(np.asarray(Image.open(file.parent / "files" / stored_at)), picture)
    assert read_tensorboard(folder).Scalars("loss")[1].value == 0.125


def test_wandb_can_be_used_again_in_the_same_process(tmp_path, offline_wandb):
    for name in ("first", "second"):
        accelerator = make_accelerator(CPU, "fp32", tmp_path, ["wandb"], name)
        accelerator.log({"loss": 1.0}, step=1)
        accelerator.end_training()
    runs = [
        record.run.display_name
        for file in tmp_path.glob("wandb/offline-run-*/run-*.wandb")
        for record in read_wandb(file)
        if record.WhichOneof("record_type") == "run"
    ]
    assert sorted(runs) == ["first", "second"]
    assert not (tmp_path / "tensorboard").exists()


def test_wandb_that_is_not_logged_in_says_what_to_do(tmp_path, offline_wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(UsageError, match=r"--trackers wandb: .*wandb login.*WANDB_MODE=offline"):
        make_accelerator(CPU, "fp32", tmp_path, ("tensorboard", "wandb"))
    assert wandb_services() == []
    assert not (tmp_path / "tensorboard").exists()


def test_wandb_that_is_not_installed_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match=r"--trackers wandb: .*pip install 'samcache\[wandb\]'"):
        make_accelerator(CPU, "fp32", tmp_path, ("tensorboard", "wandb"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_called_wandb_is_not_the_package(tmp_path, monkeypatch):
    """Every run of W&B leaves such a folder, and `python -m` looks for packages where it is called."""
    (tmp_path / "wandb").mkdir()
    for name in [name for name in sys.modules if name.split(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UsageError, match="not installed"):
        make_accelerator(CPU, "fp32", tmp_path / "run", ["wandb"])


def test_unknown_tracker(tmp_path):
    with pytest.raises(UsageError, match="--trackers mlflow: unknown tracker; use tensorboard, wandb or both"):
        make_accelerator(CPU, "fp32", tmp_path, ("tensorboard", "mlflow"))


def test_no_trackers(tmp_path):
    accelerator = make_accelerator(CPU, "fp32", tmp_path, ())
    log_a_run(accelerator)
    accelerator.end_training()
    assert list(tmp_path.iterdir()) == []


def test_only_the_main_process_opens_trackers(tmp_path, monkeypatch):
    state = PartialState(cpu=True)
    monkeypatch.setitem(state._shared_state, "process_index", 1)
    accelerator = make_accelerator(CPU, "fp32", tmp_path, config=CONFIG)
    log_a_run(accelerator)
    accelerator.end_training()
    assert list(tmp_path.iterdir()) == []
