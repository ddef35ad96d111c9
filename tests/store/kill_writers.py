"""Run by test_crashes.py as a program: forks writers, which costs less than starting Python again.

kill_writers.py FOLDER   kill -9 writers of FOLDER/killed at random times until one has finished,
                         then let three write FOLDER/raced at once
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import conftest as kit

from sam_cache.store import ShardBusy
from sam_cache.store.layout import shard_path

IMAGES = 14


def write_all(path: Path, pause: float, opened: int) -> None:
    store = kit.open_for(path, kit.make_spec(early_dtype="int8"), IMAGES)
    os.write(opened, b".")
    while shards := store.uncommitted():
        for shard in shards:
            try:
                with store.writing(shard) as writer:
                    for row in shard.rows:
                        if row not in writer.kept:
                            writer.append(row, kit.values(row, store.spec), kit.content(row))
                            time.sleep(pause)
            except ShardBusy:
                time.sleep(pause)
    store.compact()


def fork_writer(path: Path, pause: float) -> tuple[int, int]:
    """Its process, and a pipe that gets a byte when it has opened the store."""
    opened, end = os.pipe()
    process = os.fork()
    if process == 0:
        status = 1
        try:
            write_all(path, pause, end)
            status = 0
        finally:
            os._exit(status)
    os.close(end)
    return process, opened


def kill(path: Path) -> None:
    """The first writers die while they prepare the store, the others while they write."""
    draw = random.Random(0)
    kills, recorded = 0, {}
    while True:
        process, opened = fork_writer(path, 0.005)
        if kills >= 4:
            os.read(opened, 1)
        os.close(opened)
        time.sleep(draw.uniform(0.0, 0.08))
        os.kill(process, signal.SIGKILL)
        if os.WIFEXITED(os.waitpid(process, 0)[1]):
            break
        kills += 1
        assert kills < 400, "no progress"
        for record in (path / "ledger").glob("shard-*.json"):
            for array in kit.make_spec(early_dtype="int8").arrays:
                placed = path / shard_path(array, int(record.stem[6:]))
                recorded.setdefault(placed, stamp(placed))
        assert recorded == {placed: stamp(placed) for placed in recorded}, "a committed shard was written again"
    assert kills > 5
    assert recorded


def stamp(path: Path) -> tuple:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size


def race(path: Path) -> None:
    processes = [fork_writer(path, 0.002)[0] for _ in range(3)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    assert codes == [0, 0, 0], codes


if __name__ == "__main__":
    kill(Path(sys.argv[1], "killed"))
    race(Path(sys.argv[1], "raced"))
