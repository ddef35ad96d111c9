"""The kernel's copies of files: held in memory while reading from it is measured, or dropped before the disk is."""

import ctypes
import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


@contextmanager
def held(files: Iterable[Path]) -> Iterator[bool]:
    """Lock the pages of `files` into memory; yields whether the system allowed it.

    A kernel that reclaims early takes pages that are not read for some seconds, which is how long the turns of the
    other contenders last, and what it reads again lies in smaller pieces, which are slower to copy. Both would be
    measured as if they were a property of the contender.
    """
    system, maps, allowed = ctypes.CDLL(None, use_errno=True), [], True
    system.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    try:
        for path in files:
            with open(path, "rb") as file:
                # Read-only: of a writable mapping the system would lock private copies.
                maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            pages = np.frombuffer(maps[-1], np.uint8)
            allowed = system.mlock(pages.ctypes.data, len(pages)) == 0 and allowed
            del pages  # else the mapping could not be closed, which unlocks it
        yield allowed
    finally:
        for mapped in maps:
            mapped.close()


def drop(files: Iterable[Path]) -> None:
    """Write `files` to disk and let go of the copies in memory."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
