"""Memory that was freed is used again, without asking the system for it page by page."""

import json
import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is adjusted"
)

# A stand-in for a recording: 160 tensors of 1.5 MB. The settings are those of a whole process, so each try has its own.
SCRIPT = """
import json, resource, sys
import torch
from optlens import allocator

def keep():
    return [torch.ones(384, 1024) for _ in range(160)]

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

reserved = int(sys.argv[1])
found = {"found": allocator._glibc() is not None}
allocator.reserve(reserved)
found["adjusted"] = allocator._keep_freed_memory.cache_info().currsize == 1
kept = keep()
del kept
allocator.reserve(reserved)
before = faults()
kept = keep()
found["faults again"] = faults() - before
del kept
held = resident()
allocator.release()
found["released"] = held - resident()
print(json.dumps(found))
"""
KEPT = 160 * 384 * 1024 * 4  # 252 MB, or 61,440 pages of 4 kB


def run(reserved: int, **environment: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(reserved)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_freed_memory_is_used_again_and_can_be_given_back():
    found = run(KEPT)
    assert found["adjusted"]
    assert found["faults again"] < 1000
    assert found["released"] > 0.8 * KEPT


def test_small_runs_change_nothing():
    found = run(1_000_000)
    assert not found["adjusted"]
    assert found["faults again"] > 30_000


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "131072"),
        ("MALLOC_MMAP_THRESHOLD_", "131072"),
        ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072"),
    ],
)
def test_a_user_who_tuned_the_allocator_is_left_alone(name, value):
    found = run(KEPT, **{name: value})
    assert not found["found"]
    assert not found["adjusted"]
