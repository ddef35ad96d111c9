"""zarr-python of another version, in an interpreter of its own: asked by benchmarks/read.py through `OtherPython`.

    OTHER_PYTHON benchmarks/read_elsewhere.py     # needs zarr and numpy only

The first line on stdin is JSON: the array's folder, the batches of rows, their shape and dtype. It tries what this
zarr has to offer (both codec pipelines; row by row, straight into the batch, or a batch by one orthogonal index), keeps
the fastest, and answers with a line of JSON. Then every line `go` has it read all batches and answer with the seconds.
"""

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE

import numpy as np
import zarr
from zarr.core.buffer.cpu import NDBuffer

TRIALS = 3


def row_by_row(array, rows, out):
    for row, target in zip(rows, out, strict=True):
        np.copyto(target, array[row])


def into(array, rows, out):
    for row, target in zip(rows, out, strict=True):
        array.get_basic_selection(row, out=NDBuffer.from_numpy_array(target))


def index(array, rows, out):
    np.copyto(out, array.oindex[rows])


def open_in_every_way(folder):
    """Name of a way to read -> (array, function)."""
    found = {}
    for pipeline in ("BatchedCodecPipeline", "FusedCodecPipeline"):
        if not hasattr(zarr.core.codec_pipeline, pipeline):
            continue
        with zarr.config.set({"codec_pipeline.path": f"zarr.core.codec_pipeline.{pipeline}"}):
            array = zarr.open_array(folder, mode="r")
        found |= {f"{pipeline}, {read.__name__}": (array, read) for read in (row_by_row, into, index)}
    return found


def seconds_for(array, read, batches, out):
    started = time.perf_counter()
    for rows in batches:
        read(array, rows, out[: len(rows)])
    return time.perf_counter() - started


def choose(ways, rows, out):
    """The fastest way, and the seconds of each that works; what is far slower than the best is tried once."""
    tried, errors = {}, {}
    for name, (array, read) in ways.items():
        try:
            taken = [seconds_for(array, read, [rows], out)]
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"
            continue
        if taken[0] < 3 * min(tried.values(), default=taken[0]):
            taken += [seconds_for(array, read, [rows], out) for _ in range(TRIALS)]
        tried[name] = min(taken)
    return min(tried, key=tried.get), tried, errors


class OtherPython:
    """This program in another interpreter: a process that waits between its turns."""

    def __init__(self, python: str, folder: Path, values: np.ndarray, batches: list[list[int]]):
        """`values` (rows, C, H, W) is what the array in `folder` should hold."""
        self.process = subprocess.Popen([python, __file__], stdin=PIPE, stdout=PIPE, text=True)
        asked = {"folder": str(folder), "batches": batches, "shape": values.shape[1:], "dtype": str(values.dtype)}
        self.answer: dict = json.loads(self._ask(json.dumps(asked)))
        if self.answer["sha256"] != hashlib.sha256(values[batches[0]]).hexdigest():
            raise AssertionError(f"{python} did not read what was written")

    @property
    def name(self) -> str:
        return "zarr_python_" + "_".join(self.answer["zarr"].split(".")[:2])

    def read_all(self) -> None:
        self._ask("go")

    def close(self) -> None:
        with self.process:  # which closes its ends and waits for it
            pass

    def _ask(self, line: str) -> str:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        if not (answer := self.process.stdout.readline()):
            raise RuntimeError(f"{self.process.args[0]} ended with status {self.process.wait()}")
        return answer


def main():
    asked = json.loads(sys.stdin.readline())
    batches = asked["batches"]
    out = np.zeros((len(batches[0]), *asked["shape"]), asked["dtype"])
    ways = open_in_every_way(asked["folder"])
    name, tried, errors = choose(ways, batches[0], out)
    array, read = ways[name]
    read(array, batches[0], out)
    answer = {
        "zarr": zarr.__version__,
        "python": sys.version.split()[0],
        "way": name,
        "tried_s": tried,
        "errors": errors,
        "sha256": hashlib.sha256(out).hexdigest(),
    }
    print(json.dumps(answer), flush=True)
    for _ in sys.stdin:
        print(seconds_for(array, read, batches, out), flush=True)


if __name__ == "__main__":
    main()
