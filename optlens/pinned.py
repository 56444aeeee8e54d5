"""Copies from a GPU to the host that nobody waits for until they are read.

A copy to ordinary memory holds up Python until the GPU has computed what is copied. Memory that is
page-locked ("pinned") the GPU writes by itself: Python goes on handing it work. The copies run on
the stream that computes, behind what is copied and before whatever is computed next, so a value
that is overwritten in place afterwards has been copied by then.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

import torch
from torch import Tensor


def host_tensor(size: Iterable[int], dtype: torch.dtype, source: torch.device) -> Tensor:
    """Set host memory aside for what is computed on a device; pinned, if that is a GPU.

    Example:
        >>> host_tensor((2, 3), torch.float32, torch.device("cpu")).is_pinned()
        False
    """
    if source.type == "cuda" and torch.cuda.is_available():
        with suppress(RuntimeError):  # systems limit how much may be locked
            return torch.empty(*size, dtype=dtype, pin_memory=True)
    return torch.empty(*size, dtype=dtype)


def pinned_bytes(n_bytes: int) -> int:
    """Return the bytes of a pinned buffer, which PyTorch rounds up to a power of two.

    So does its `CachingHostAllocator` (`aten/src/ATen/core/CachingHostAllocator.h`, PyTorch 2.13),
    unless PYTORCH_ALLOC_CONF sets `pinned_max_round_threshold_mb`; it keeps freed buffers for
    reuse. This is computed from that source, not measured.

    Example:
        >>> pinned_bytes(150_994_944) == 2**28
        True
    """
    return 1 << (n_bytes - 1).bit_length() if n_bytes else 0


def copy_later(target: Tensor, value: Tensor) -> None:
    """Order a copy to pinned memory; before the host reads it, `wait_for` the value's device.

    Args:
        target: The memory, `[batch, ...]`, of any strides.
        value: What to copy, of the same shape.
    """
    pairs = [(target, value)] if target.is_contiguous() else zip(target, value, strict=True)
    for own, given in pairs:  # a strided copy is made by way of ordinary memory
        own.copy_(given, non_blocking=own.is_contiguous())


def wait_for(devices: Iterable[torch.device]) -> None:
    """Wait until GPUs have done all that was ordered from them."""
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
