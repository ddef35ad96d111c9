"""A ring of reused batch tensors, filled by threads ahead of the consumer."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from sam_cache.store.reader import RowReader


@dataclass(frozen=True)
class Ring:
    """Iterates {level: (rows, C, H, W)} for each batch of rows, in order.

    `depth` buffers are reused, because touching fresh memory costs more than reading into it.
    A yielded batch is a view of one of them: it is valid until `keep` further batches have been
    asked for. With `keep=1` that is until the next one; a consumer that starts an asynchronous
    copy and waits for it one step later needs `keep=2`. While the consumer works,
    `depth - keep` batches are being read or ready. `pin` makes the buffers page-locked.

    Batches may differ in length. `batches` is advanced in the consumer's thread, at most
    `depth` batches ahead of it. An error while reading is raised where its batch was due.
    When the iterator is exhausted, closed or dropped, its threads have ended.
    """

    reader: RowReader
    batches: Iterable[Sequence[int]]
    depth: int = 4
    threads: int = 2
    keep: int = 1
    pin: bool = False

    def __post_init__(self):
        if not 1 <= self.keep <= self.depth:
            raise ValueError(f"keep={self.keep} must be between 1 and depth={self.depth}")

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        free = deque(self.reader.empty(0) for _ in range(self.depth))
        ahead: deque[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], Future]] = deque()
        behind: deque[dict[str, torch.Tensor]] = deque()
        batches = iter(self.batches)
        with ThreadPoolExecutor(self.threads, "ring") as pool:
            try:
                while True:
                    if len(behind) == self.keep:
                        free.append(behind.popleft())
                    while free and (rows := next(batches, None)) is not None:
                        buffer = self._fit(free.popleft(), len(rows))
                        filled = {name: tensor[: len(rows)] for name, tensor in buffer.items()}
                        ahead.append((buffer, filled, pool.submit(self.reader.read, rows, filled)))
                    if not ahead:
                        return
                    buffer, filled, reading = ahead.popleft()
                    reading.result()
                    behind.append(buffer)
                    yield filled
            finally:
                for *_, reading in ahead:
                    reading.cancel()

    def _fit(self, buffer: dict[str, torch.Tensor], rows: int) -> dict[str, torch.Tensor]:
        """The buffer, or a larger one where a batch is longer than any it has held."""
        if len(next(iter(buffer.values()))) >= rows:
            return buffer
        return self.reader.empty(rows, self.pin)
