"""Other formats to keep rows in, for benchmarks/read.py: each function writes its own, once, and gives a `Read`."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from read_contenders import Data, Read, copied
from torch import Tensor


def npy_files(data: Data) -> list[Path]:
    folder = data.folder / "npy"
    files = [folder / f"{row}.npy" for row in range(len(data.values))]
    if not folder.exists():
        folder.mkdir()
        for file, value in zip(files, data.values, strict=True):
            np.save(file, value)
    return files


def npy(data: Data) -> Read:
    files = npy_files(data)
    return copied(lambda row: np.load(files[row]))


def torch_save(data: Data) -> Read:
    folder = data.room("torch")
    for row, value in enumerate(data.values):
        torch.save(torch.from_numpy(value), folder / f"{row}.pt")
    return copied(lambda row: torch.load(folder / f"{row}.pt").numpy())


def h5py(data: Data) -> Read:
    import h5py

    path = data.room("h5py") / "rows.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("neck", data=data.values, chunks=(1, *data.values.shape[1:]))
    rows_of = h5py.File(path, "r")["neck"]

    def read(rows: list[int], out: Tensor) -> None:
        for row, target in zip(rows, out.numpy(), strict=True):
            rows_of.read_direct(target, np.s_[row])

    return read


def lmdb(data: Data) -> Read:
    import lmdb

    room = lmdb.open(str(data.room("lmdb")), map_size=2 * data.values.nbytes + 2**24)
    for row, value in enumerate(data.values):
        with room.begin(write=True) as change:
            change.put(b"%d" % row, value.tobytes())
    look, shape = room.begin(buffers=True), data.values.shape[1:]
    return copied(lambda row: np.frombuffer(look.get(b"%d" % row), np.float16).reshape(shape))


def litdata(data: Data) -> Read:
    from litdata import StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    folder = str(data.room("litdata"))
    writer = BinaryWriter(folder, chunk_bytes="64MB")
    for row, value in enumerate(data.values):
        writer[row] = torch.from_numpy(value)
    writer.done()
    writer.merge()
    rows_of = StreamingDataset(folder)
    return copied(lambda row: rows_of[row].numpy())


def mosaicml_streaming(data: Data) -> Read:
    from streaming import LocalDataset, MDSWriter

    folder = str(data.room("mosaicml_streaming"))
    shape = ",".join(map(str, data.values.shape[1:]))
    with MDSWriter(out=folder, columns={"neck": f"ndarray:float16:{shape}"}) as writer:
        for value in data.values:
            writer.write({"neck": value})
    rows_of = LocalDataset(folder)
    return copied(lambda row: rows_of[row]["neck"])


def webdataset(data: Data) -> Read:
    """In the order of the file, whatever rows are asked for: it has no other."""
    import webdataset

    path = str(data.room("webdataset") / "rows.tar")
    with webdataset.TarWriter(path) as writer:
        for row, value in enumerate(data.values):
            writer.write({"__key__": f"{row:08d}", "npy": value})
    stream: Iterator = iter(())

    def get(row: int) -> np.ndarray:
        nonlocal stream
        if (found := next(stream, None)) is None:
            stream = iter(webdataset.WebDataset(path, shardshuffle=False).decode())
            found = next(stream)
        return found["npy"]

    return copied(get)


OTHER_FORMATS = (npy, torch_save, h5py, lmdb, litdata, mosaicml_streaming, webdataset)
