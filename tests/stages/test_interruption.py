"""Stop `samcache embed` at any time: the same command finishes the rest and redoes nothing committed."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sam_cache.store import EmbeddingStore, verify

EMBED = ("embed", "--dataset", "synthetic", "--model", "tiny", "--shard-rows", "4", "--scenes", "40", "--threads", "1")


def start(store: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "sam_cache", *EMBED, "--store", str(store)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def committed(store: Path) -> dict[str, int]:
    return {path.parts[-4]: path.stat().st_ino for path in store.glob("neck/c/*/0/0/0")}


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_stop_and_go_on(tmp_path, number, code):
    store = tmp_path / "s.zarr"
    process = start(store)
    while len(committed(store)) < 2 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    assert EmbeddingStore.open(store).uncommitted()
    kept = committed(store)

    again = start(store)
    _, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert kept.items() <= committed(store).items()
    assert verify(store).ok

    whole = tmp_path / "whole.zarr"
    uninterrupted = start(whole)
    uninterrupted.communicate(timeout=300)
    assert uninterrupted.returncode == 0
    shards = sorted(path.relative_to(whole) for path in whole.glob("neck/c/*/0/0/0"))
    assert [(whole / path).read_bytes() for path in shards] == [(store / path).read_bytes() for path in shards]
