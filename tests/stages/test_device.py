import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from sam_cache.ranks import Ranks
from sam_cache.stages.device import pick_device

def count_faults() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(10 * 2**20)  # 40 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

count_faults()
before = count_faults()
pick_device("cpu", Ranks())
count_faults()
print(before, count_faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_a_process_on_a_cpu_keeps_what_tensors_free():
    ended = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    before, after = map(int, ended.stdout.split())
    assert before > 100_000  # pages touched for the first time, 10,240 in each of 20 turns
    assert after < 1000
