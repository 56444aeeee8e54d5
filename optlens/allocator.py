"""Let recordings reuse memory instead of fetching it page by page from the system.

A recording of everything keeps hundreds of megabytes. Fetched from the system 4 kB at a time, as the
C library does by default, that costs 1.8 microseconds a page: 0.3 s for the 660 MB of a 125m model at
512 tokens, against 0.8 s for the forward pass itself. And dropping the recording hands the memory
back, so that the next one pays again. Two settings of glibc cure both: freed memory stays in the
process, and new memory is asked for in one block, backed by pages of 2 MB.

Tensors stay ordinary tensors, nothing is copied, and no code that computes knows of this file. On
systems without glibc, and for users who tuned its allocator themselves, nothing is done.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os

# parameters of mallopt, from malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
GLIBC_MMAP_MAX = 65536  # glibc's default for M_MMAP_MAX
LARGEST_MMAP_THRESHOLD = 32 * 1024**2  # glibc refuses more
LARGEST_TRIM_THRESHOLD = 2**31 - 1  # mallopt takes an int
HUGE_PAGE = 2 * 1024**2

# Below this many bytes the page faults cost less than anybody notices (0.03 s).
WORTH_IT = 64 * 1024**2

# A user who sets one of these has tuned the allocator, which then stays as it is.
USER_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")


def reserve(n_bytes: int) -> None:
    """Have this much memory ready in the process for tensors on the CPU that come next.

    From the first call on, the process keeps freed memory for reuse: at most an eighth of the
    machine's, and at most 2 GiB; `release` gives it back. What a larger recording needs beyond that
    comes from the system as ever. Calls for less than 64 MB do nothing. Where the process holds
    enough already, this takes microseconds.

    Args:
        n_bytes: The bytes of all tensors to be kept, together.

    Example:
        >>> reserve(100 * 1024**2)
    """
    libc = _glibc()
    if libc is None or n_bytes < WORTH_IT:
        return
    # Room for what the run needs besides. Beyond the limit, free() would give the block back at once.
    n_bytes = min(n_bytes + n_bytes // 4, _keep_freed_memory() - WORTH_IT)
    # Without M_MMAP_MAX=0 a block this large would be a mapping of its own, unmapped by free().
    # So it is cut from the heap, and stays there, on top, when it is freed.
    libc.mallopt(M_MMAP_MAX, 0)
    block = libc.malloc(n_bytes)
    if block:
        first = -(-block // HUGE_PAGE) * HUGE_PAGE
        whole = (block + n_bytes - first) // HUGE_PAGE * HUGE_PAGE
        # Where huge pages are switched off this fails, and 4 kB pages do the work as before.
        libc.madvise(first, whole, mmap.MADV_HUGEPAGE)
        libc.free(block)
    libc.mallopt(M_MMAP_MAX, GLIBC_MMAP_MAX)


def release() -> None:
    """Give freed memory that the process holds for reuse back to the system.

    Example:
        >>> release()
    """
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    """Return the C library if it is glibc and its user left the allocator alone."""
    tuned = any(name in os.environ for name in USER_SETTINGS)
    if tuned or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return None
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # not Linux
        return None
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):  # another C library, such as musl
        return None
    libc.mallopt.argtypes = [ctypes.c_int, ctypes.c_int]
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.malloc_trim.argtypes = [ctypes.c_size_t]
    return libc


@functools.cache
def _keep_freed_memory() -> int:
    """Set glibc's thresholds, once per process; return how much is kept at most."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    libc = _glibc()
    # Either setting switches off glibc's own adjustment of both, so both are set.
    libc.mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
    limit = min(LARGEST_TRIM_THRESHOLD, machine // 8)
    libc.mallopt(M_TRIM_THRESHOLD, limit)
    return limit
