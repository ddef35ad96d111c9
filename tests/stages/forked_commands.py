"""Run by conftest.py as a program: starts samcache commands by forking, which costs less than importing torch again.

Reads one command a line as JSON, {"arguments", "folder", "ranks", "faults"}, and answers with the exit
codes of its processes once all have ended. What they print goes to FOLDER/said-<rank>.txt. A fault,
{"name", "rank", ...}, is something that happens in one of the processes: a function of this file with the
other values as arguments.
"""

import json
import os
import signal
import socket
import sys
from pathlib import Path

import torch
import torch.utils.tensorboard  # noqa: F401  (imported here once, and not in every process)

from sam_cache import cli
from sam_cache.model import Top
from sam_cache.stages import train_full, train_top, training  # noqa: F401  (as torch's above)
from sam_cache.stages.decoding import SamObjective
from sam_cache.training import run_folder

MOST_SECONDS = 300  # before a process that hangs is killed, so that its test fails and does not hang too


def send_signal(number: int, after_step: int) -> None:
    """To the process itself, once it has taken `after_step` steps and before a checkpoint holds the last of them."""
    taken = 0
    advance = training.Bar.advance

    def advance_and_send(bar: training.Bar, *arguments, **named) -> None:
        nonlocal taken
        taken += 1
        advance(bar, *arguments, **named)
        if taken == after_step:
            os.kill(os.getpid(), number)

    training.Bar.advance = advance_and_send


def die_at_sync(number: int) -> None:
    """Killed when it is about to make sure, for the `number`-th time, that something is on disk."""
    left = number
    sync = os.fsync

    def sync_or_die(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(descriptor)

    os.fsync = sync_or_die


def die_between(first: str, second: str) -> None:
    """Killed after writing one file of the run folder, and before another."""
    write = run_folder.durable.replace

    def write_or_die(path: Path, data: bytes) -> None:
        if path.name == second and written == [first]:
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, data)
        written[:] = [path.name]

    written: list[str] = []
    run_folder.durable.replace = write_or_die


def break_loss(at_batch: int) -> None:
    """The loss of one batch that fits the mask budget, counted from 1, is not a number."""
    seen = 0
    ask = SamObjective.__call__

    def ask_and_break(objective: SamObjective, network: torch.nn.Module, batch):
        nonlocal seen
        seen += 1
        for losses in ask(objective, network, batch):
            yield losses | {"loss": losses["loss"] * (float("nan") if seen == at_batch else 1.0)}

    SamObjective.__call__ = ask_and_break


def start_from_other_weights() -> None:
    make = Top.__init__

    def make_and_shift(top: Top, *arguments, **named) -> None:
        make(top, *arguments, **named)
        with torch.no_grad():
            top.mask_decoder.iou_token.weight.add_(1e-3)

    Top.__init__ = make_and_shift


def note_writes() -> None:
    """Print every file and folder that is made, opened for writing, renamed or removed."""

    def note(event: str, arguments: tuple) -> None:
        changing = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
        if event == "open" and isinstance(arguments[2], int):
            changing = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND))
        if changing:
            print(f"wrote {arguments[0]}", file=sys.stderr)

    sys.addaudithook(note)


def run_command(asked: dict, rank: int, port: int) -> int:
    """In a process of its own; returns its exit code."""
    said = os.open(Path(asked["folder"], f"said-{rank}.txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(said, stream)
    signal.alarm(MOST_SECONDS)
    os.chdir(asked["folder"])
    torch.set_num_threads(1)
    if asked["ranks"] > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(asked["ranks"])}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for fault in asked["faults"]:
        name, of_rank, values = fault.pop("name"), fault.pop("rank"), fault
        if rank == of_rank:
            globals()[name](**values)
    cli.main(asked["arguments"])
    return 0


def fork(asked: dict, rank: int, port: int) -> int:
    process = os.fork()
    if process:
        return process
    try:
        code = run_command(asked, rank, port)
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stderr.flush()
    os._exit(code)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


if __name__ == "__main__":
    for line in sys.stdin:
        asked = json.loads(line)
        port = free_port()
        processes = [fork(asked, rank, port) for rank in range(asked["ranks"])]
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
        print(json.dumps(codes), flush=True)
