"""Handing back the memory of a mapped file, tensor by tensor.

What is read from a mapped file stays in the process's memory, page by page, until the mapping is
closed. After a conversion nobody needs it: the system is told so, and reads the file again if
somebody looks after all.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable

from torch import Tensor


def hand_back(tensor: Tensor) -> None:
    """Let the system drop the pages that hold nothing but a tensor's numbers.

    Only for tensors mapped from a file, privately and unwritten: in any other memory they would be
    zeros afterwards. Where the system has no such call, nothing happens.

    Args:
        tensor: Contiguous, on the CPU.
    """
    drop = _madvise()
    start = tensor.data_ptr()
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    n_bytes = (start + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if drop is not None and n_bytes > 0:
        drop(first, n_bytes, mmap.MADV_DONTNEED)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """Return the system's call, if it has one."""
    if not hasattr(mmap, "MADV_DONTNEED"):  # Windows
        return None
    call = ctypes.CDLL(None).madvise
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return call
