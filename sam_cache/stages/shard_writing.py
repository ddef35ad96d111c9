"""Rows written by a thread of their own while the encoder goes on with the next ones, or in turn."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from types import TracebackType

import numpy as np
from torch import Tensor

from sam_cache.store import EmbeddingStore, Shard, ShardBusy, ShardWriter


class WritingThread:
    """Does what it is given in order, in one thread; the giver waits while `ahead` pieces are not done.

    A piece that fails is the last that is begun; what it raised is raised by the next `give` or `finish`.
    With `ahead` 0 there is no thread: the giver does the piece itself.
    """

    def __init__(self, ahead: int = 2):
        self._ahead = ahead
        self._thread = ThreadPoolExecutor(1, "writing")
        self._given: deque[Future] = deque()
        self._failed = False

    def __enter__(self) -> "WritingThread":
        return self

    def __exit__(self, *_) -> None:
        self._thread.shutdown(cancel_futures=True)

    def give(self, piece: Callable[[], None]) -> None:
        if not self._ahead:
            piece()
            return
        while len(self._given) >= self._ahead:
            self._given.popleft().result()
        self._given.append(self._thread.submit(self._do, piece))

    def finish(self) -> None:
        """Wait until all is done."""
        while self._given:
            self._given.popleft().result()

    def _do(self, piece: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            piece()
        except BaseException:
            self._failed = True
            raise


@dataclass
class _OpenShard:
    context: AbstractContextManager[ShardWriter]
    writer: ShardWriter
    lacking: int


class OpenShards:
    """Shards that are being written; each is committed with the last row that it lacked.

    Several are open at a time where rows of the next are read ahead. One thread opens them, another one
    writes. On leaving, by an exception, what is not whole keeps its rows for whoever comes next.
    """

    def __init__(self, store: EmbeddingStore):
        self._store = store
        self._open: dict[int, _OpenShard] = {}  # by shard

    def __enter__(self) -> "OpenShards":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for shard in list(self._open):
            self._open.pop(shard).context.__exit__(kind, error, trace)

    def open(self, shard: Shard) -> list[int]:
        """The rows that the shard lacks, to be given by `append` or `fail`; if none, `commit` it.

        Raises ShardBusy where another process writes the shard: its own record will tell.
        """
        context = self._store.writing(shard)
        writer = context.__enter__()
        rows = [row for row in shard.rows if row not in writer.kept]
        self._open[shard.index] = _OpenShard(context, writer, len(rows))
        return rows

    def append(self, row: int, values: dict[str, np.ndarray | Tensor], content: str) -> None:
        """As `ShardWriter.append`."""
        shard = self._open[row // self._store.spec.shard_rows]
        shard.writer.append(row, values, content)
        self._count(row)

    def fail(self, row: int, message: str) -> None:
        self._open[row // self._store.spec.shard_rows].writer.fail(row, message)
        self._count(row)

    def commit(self, index: int) -> None:
        # Another process may have committed it after all.
        with suppress(ShardBusy):
            self._open.pop(index).context.__exit__(None, None, None)

    def _count(self, row: int) -> None:
        index = row // self._store.spec.shard_rows
        self._open[index].lacking -= 1
        if not self._open[index].lacking:
            self.commit(index)
