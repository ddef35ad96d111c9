"""The image encoder as `embed` runs it: compiled on a GPU, its results brought to the writer beside the next batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sam_cache.batches import PixelBatch
from sam_cache.errors import UsageError
from sam_cache.model import Encoder
from sam_cache.stages.progress import say

WORTH_COMPILING = 4000  # rows from which on the minute that it takes comes back


def wants_compiling(asked: bool | None, device: torch.device, rows: int) -> bool:
    """As asked for, else on a GPU where there is enough to do. Raises UsageError for another device."""
    if asked and device.type != "cuda":
        raise UsageError(f"--compile: there is nothing to gain from it on {device.type}; leave it out")
    return device.type == "cuda" and (rows >= WORTH_COMPILING if asked is None else asked)


def compile_encoder(encoder: Encoder, batch_size: int, device: torch.device) -> None:
    """Compile for batches of this size, the fastest way that works here; without, where none does."""
    size = encoder.size.input_size
    pixels = torch.zeros(batch_size, 3, size, size, dtype=torch.uint8, device=device)
    content_hw = torch.full((batch_size, 2), size, device=device)
    reasons = []
    for places in ("kernel", "channels"):
        encoder.compile_blocks(places)
        try:
            with torch.inference_mode():
                encoder(pixels, content_hw)
            return
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler has many: no C compiler, no Triton, a kernel too large for this GPU
            reasons.append(str(error).strip().partition("\n")[0])
    encoder.compiled = None
    say(f"the encoder could not be compiled and runs as it is: {reasons[-1]}")


@dataclass(frozen=True)
class Encoded:
    """Levels of a batch's images on the device; on a GPU they are there once `done` has come to pass."""

    levels: dict[str, Tensor]
    done: torch.cuda.Event | None


class Encoding:
    """Runs the encoder on batches of at most `batch_size` images."""

    def __init__(self, encoder: Encoder, device: torch.device, batch_size: int, quantised: set[str]):
        self.batch_size = batch_size
        self.pinned = device.type == "cuda"  # where it wants its pixels
        self._encoder, self._device = encoder, device
        self._quantised = quantised  # levels that are stored as int8
        self._copying = torch.cuda.Stream(device) if self.pinned else None

    @torch.inference_mode()
    def encode(self, batch: PixelBatch) -> Encoded:
        """Start encoding the batch; uint8 travels to the device and is normalised there.

        The levels are contiguous, for int8 asks for each channel's range.
        """
        if not batch.rows:
            return Encoded({}, None)
        pixels, content_hw = batch.pixels, batch.content_hw
        if self._encoder.compiled:  # for this many images and no others
            missing = self.batch_size - len(batch.rows)
            pixels, content_hw = F.pad(pixels, (0, 0) * 3 + (0, missing)), F.pad(content_hw, (0, 0, 0, missing))
        found = self._encoder(
            pixels.to(self._device, non_blocking=True), content_hw.to(self._device, non_blocking=True)
        )
        levels = {name: level[: len(batch.rows)].contiguous() for name, level in found.items()}
        if self._copying is None:
            # Whoever writes them may be another thread, which not every device allows to ask for its tensors.
            return Encoded({name: level.cpu() for name, level in levels.items()}, None)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self._device))
        return Encoded(levels, done)

    @contextmanager
    def fetched(self, encoded: Encoded) -> Iterator[dict[str, Tensor]]:
        """The levels as the writer wants them, from another thread than the one that encodes.

        From a GPU they come on a stream of their own: on the encoder's a copy would wait for the next batch, and
        that batch for the copy. Levels to be quantised stay there, and are quantised on this stream.
        """
        if encoded.done is None:
            yield encoded.levels
            return
        with torch.cuda.stream(self._copying):
            self._copying.wait_event(encoded.done)
            levels = {
                name: level if name in self._quantised else level.to("cpu", non_blocking=True)
                for name, level in encoded.levels.items()
            }
            self._copying.synchronize()
            yield levels
