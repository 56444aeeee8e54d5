"""Handing back the memory of a mapped file, tensor by tensor.

What is read from a mapped file stays in the process's memory, page by page, until the mapping is
closed. After a conversion nobody needs it: the system is told so, and reads the file again if
somebody looks after all.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable, Iterable

from torch import Tensor


def hand_back(tensors: Iterable[Tensor]) -> None:
    """Let the system drop the pages that hold nothing but the numbers of some tensors.

    Only for tensors mapped from files, privately, where nobody has written yet: in any other memory
    they would be zeros afterwards. What lies between them, less than a page, counts as theirs.
    Where the system has no such call, nothing happens.

    Args:
        tensors: Contiguous, on the CPU.
    """
    drop, page = _madvise(), mmap.PAGESIZE
    if drop is None:
        return
    # Every call has all processors stop to forget the pages, so neighbours share one.
    stretches: list[tuple[int, int]] = []
    for start, end in sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors):
        if stretches and start - stretches[-1][1] < page:
            start, end = stretches[-1][0], max(end, stretches.pop()[1])
        stretches.append((start, end))
    for start, end in stretches:
        first = -(-start // page) * page
        if end - first >= page:
            drop(first, (end - first) // page * page, mmap.MADV_DONTNEED)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """Return the system's call, if it has one."""
    if not hasattr(mmap, "MADV_DONTNEED"):  # Windows
        return None
    call = ctypes.CDLL(None).madvise
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return call
