"""Memory that this process has freed stays with it."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let the C library reuse large blocks instead of giving them back; False where it is not glibc.

    A training step on a CPU frees the same gigabytes that the next one asks for. By default glibc returns
    them to the system, which then clears every page anew: a third of the step's time. The process keeps the
    most it ever held.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return bool(library.mallopt(M_MMAP_MAX, 0) and library.mallopt(M_TRIM_THRESHOLD, -1))
