"""What a person sees while a stage runs, and how they stop it. All of it goes to stderr."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from sam_cache.errors import Interrupted
from sam_cache.ranks import Ranks

_hushed: ContextVar[bool] = ContextVar("hushed", default=False)


@contextmanager
def hushed() -> Iterator[None]:
    """For a stage that runs others within: they say nothing and draw no bar; their errors speak."""
    before = _hushed.set(True)
    try:
        yield
    finally:
        _hushed.reset(before)


def say(text: str) -> None:
    """Tell the person; of several processes the first one speaks."""
    if Ranks.from_env().rank == 0 and not _hushed.get():
        print(text, file=sys.stderr)


def say_some(what: str, lines: list[str], most: int = 20) -> None:
    """The first lines of a long list, and how many there are more."""
    for line in lines[:most]:
        say(f"{what}: {line}")
    if len(lines) > most:
        say(f"{what}: ... and {len(lines) - most} more")


class _Rate(ProgressColumn):
    def render(self, task) -> Text:
        unit = task.fields["unit"]
        return Text(f"{task.speed:.1f} {unit}/s" if task.speed else f"- {unit}/s")


class Bar:
    """A progress bar with rate and time left; shows only on a terminal."""

    def __init__(self, title: str, total: int, unit: str, done: int = 0):
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty() or Ranks.from_env().rank > 0 or _hushed.get(),
        )
        self._task = self._bar.add_task(title, total=total, completed=done, unit=unit, note="")

    def __enter__(self) -> "Bar":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def show(self, done: int, total: int) -> None:
        """Set how much of how much is done, for work that counts by itself."""
        self._bar.update(self._task, completed=done, total=total)

    def advance(self, count: int = 1, note: str = "") -> None:
        self._bar.update(self._task, advance=count, **({"note": note} if note else {}))


class Stop:
    """Set once the person (Ctrl-C) or the scheduler (SIGTERM) asks to stop; a second signal stops at once."""

    requested = False

    def __call__(self) -> bool:
        return self.requested

    def check(self, message: str) -> None:
        """Raise Interrupted with `message` if asked to stop."""
        if self.requested:
            raise Interrupted(message)


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Turn SIGINT and SIGTERM into a request that the loop honours between two batches."""
    stop = Stop()

    def request(number: int, frame: FrameType | None) -> None:
        if stop.requested:
            if number == signal.SIGTERM:  # a launcher and a scheduler may each send one
                return
            raise KeyboardInterrupt
        stop.requested = True
        say("stopping after this batch; once more stops at once")

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
