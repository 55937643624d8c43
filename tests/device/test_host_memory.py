"""Memory that a step frees serves the next step: counted in page faults of a process of its own."""

import os
import subprocess
import sys

import pytest

from megatron_mtp.device.host_memory import _glibc

pytestmark = pytest.mark.skipif(_glibc() is None, reason="glibc's allocator is what is set here")

STEPS = """
import resource, sys
from megatron_mtp.device.host_memory import keep_freed_memory, return_freed_memory
from megatron_mtp.device.memory_meter import peak_resident_bytes

print(keep_freed_memory() if sys.argv[1] == "keep" else None)
for step in range(6):
    if step == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [bytearray(b"x") * (size << 20) for size in (40, 64, 33)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()


kept = resident()
return_freed_memory()
print((kept - resident()) >> 20)
"""
PAGES_OF_A_STEP = (40 + 64 + 33) * 2**20 // os.sysconf("SC_PAGE_SIZE")


def steps(word: str, **environment: str) -> list[str]:
    """What `keep_freed_memory` returned, the page faults of five steps, and the MiB that were given back after them."""
    found = subprocess.run(
        [sys.executable, "-c", STEPS, word],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return found.stdout.split()


def test_kept_memory_is_met_without_page_faults_and_can_be_given_back():
    kept, faults, returned = steps("keep")
    assert kept == "True"
    assert int(faults) < PAGES_OF_A_STEP / 50
    assert int(returned) >= 130


def test_without_it_each_step_meets_new_pages():
    _, faults, _ = steps("leave")
    assert int(faults) > PAGES_OF_A_STEP


@pytest.mark.parametrize(
    "environment",
    [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=65536"}],
    ids=lambda environment: next(iter(environment)),
)
def test_the_users_own_setting_stands(environment):
    kept, faults, _ = steps("keep", **environment)
    assert kept == "False"
    assert int(faults) > PAGES_OF_A_STEP / 2
