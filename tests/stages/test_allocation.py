"""Freed memory is kept, where the C library can be told to."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import numpy as np
from sam_cache.stages.allocation import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**27, dtype=np.uint8).sum()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
without = faults()
kept = keep_freed_memory()
faults()
print(kept, without, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_that_was_freed_is_not_cleared_again():
    said = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout
    kept, without, with_it = said.split()
    assert kept == "True"
    assert int(with_it) < 100
    assert int(with_it) < int(without)
