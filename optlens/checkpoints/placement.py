"""Where weights go and in which dtype, decided before any is read."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from optlens.checkpoints.errors import CheckpointError
from optlens.checkpoints.matching import Places
from optlens.footprint import matrix_bytes
from optlens.memory import available_bytes, describe_bytes

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
}
# The rest of a notebook, and gaps in the memory, need room too.
USABLE = 0.9


def parse_device(device: str | torch.device) -> torch.device:
    """Return the device meant; "auto" is the first GPU, or the CPU where there is none.

    Raises:
        ValueError: If there is no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f'device={device!r} is not a device; give "auto", "cpu", "cuda", "cuda:1" or "mps".'
        ) from error
    if parsed.type == "cuda" and (parsed.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={device!r} was asked for, but PyTorch sees {torch.cuda.device_count()} CUDA "
            'devices; use device="cpu", or install a CUDA build of PyTorch.'
        )
    if parsed.type == "meta":
        raise ValueError(
            'device="meta" holds no values, so nothing can be loaded to it; use "cpu".'
        )
    if parsed.type not in ("cpu", "cuda"):
        try:
            torch.empty(0, device=parsed)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).partition(". ")[0]
            raise ValueError(
                f'device={device!r} is not to be had here ({reason}); use device="cpu".'
            ) from error
    return parsed


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """Return the dtype meant, None for "auto".

    Raises:
        ValueError: If it is not a floating dtype that a model can run in.
    """
    if dtype == "auto":
        return None
    parsed = _DTYPES.get(str(dtype).removeprefix("torch."))
    if parsed is None:
        raise ValueError(
            f'dtype={dtype!r} is not a dtype for weights; give "auto", {", ".join(_DTYPES)}, or '
            "the torch dtype of that name."
        )
    return parsed


def choose_dtype(
    dtype: torch.dtype | None,
    device: torch.device,
    stored: torch.dtype,
    size: Callable[[torch.dtype], int],
    name: str,
    mapped: bool = True,
) -> torch.dtype:
    """Settle the dtype of a model that is about to be loaded.

    Args:
        dtype: What was asked for, None for "auto".
        device: Where the model goes.
        stored: The dtype in the files.
        size: Returns the bytes of the weights in a dtype, tied ones once.
        name: What to call the checkpoint in messages.
        mapped: Whether weights that keep their dtype on the CPU stay in the file.

    Raises:
        CheckpointError: If the model would not fit into the memory that is free.
    """
    on_cpu = device.type == "cpu"
    if dtype is None:
        dtype = torch.float32 if on_cpu else stored
        if dtype != stored and not _fits(size(dtype), device):
            warnings.warn(
                f"{name} needs {describe_bytes(size(dtype))} in float32, but only "
                f"{describe_bytes(available_bytes(device))} of memory are free; keeping its stored dtype, "
                f"{stored}. That is slower on a CPU and less exact.",
                stacklevel=4,
            )
            dtype = stored
    # Weights that stay in their stored dtype on the CPU are mapped from the file, page by page.
    is_free = mapped and on_cpu and dtype == stored
    needed = 0 if is_free else size(dtype)
    if not _fits(needed, device):
        cure = 'device="cpu"'
        if on_cpu:
            smaller = dtype.itemsize > stored.itemsize
            as_stored = f'dtype="{str(stored).removeprefix("torch.")}"'
            cure = as_stored if smaller else 'device_map="stream"'
        raise CheckpointError(
            f"{name} needs {describe_bytes(needed)} in {dtype} on {device}, but only "
            f"{describe_bytes(available_bytes(device))} are free. Try {cure}, a smaller checkpoint, or "
            "free memory first."
        )
    return dtype


def _fits(n_bytes: int, device: torch.device) -> bool:
    free = available_bytes(device)
    return free is None or n_bytes <= free * USABLE


def device_name(device: Any) -> str:
    """Spell a device with its number: "cuda" and 0 are "cuda:0". It need not be there.

    Raises:
        ValueError: If it is none.

    Example:
        >>> device_name(1), device_name("cuda"), device_name("cpu")
        ('cuda:1', 'cuda:0', 'cpu')
    """
    if isinstance(device, int):
        return f"cuda:{device}"
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f'{device!r} is no device; give for example "cuda:0" or "cpu".') from error
    return f"cuda:{parsed.index or 0}" if parsed.type == "cuda" else str(parsed)


def free_memory() -> dict[str, int | None]:
    """Return device -> free bytes, every GPU and then the CPU; None where nobody knows."""
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return {device: available_bytes(device) for device in (*gpus, "cpu")}


def weight_bytes(places: Places, dtype: torch.dtype, quantize: str | None = None) -> int:
    """Return the bytes of a model's parameters.

    Args:
        places: The parameters, by canonical name.
        dtype: Of all but quantised matrices.
        quantize: "int8" or "nf4" for the matrices of the blocks, None for none.
    """
    total = 0
    for name, at in places.items():
        shape = getattr(*at[0]).shape
        if quantize is not None and len(shape) == 2 and ".layers." in name:
            total += matrix_bytes(*shape, dtype.itemsize, quantize)
        else:
            total += shape.numel() * dtype.itemsize
    return total
