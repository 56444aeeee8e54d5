"""Writing one safetensors file, tensor by tensor.

The format is eight bytes with the header's length, a JSON header, and the tensors' bytes without
gaps. The library's own writer takes all tensors of a file at once; this one asks for each when its
turn comes, so that a model on a GPU, or one that is made up on the fly, is saved with the memory
of one tensor. The header is padded so that the data begin at a multiple of 64 bytes: products of
weights that lie so in a mapped file round as they do with freshly allocated weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
_ALIGNMENT = 64
# What transformers looks for before it reads a file.
_METADATA = {"format": "pt"}


class Digest(Protocol):
    """A hash that is being computed, as `hashlib.sha256()` returns it."""

    def update(self, data: bytes | memoryview, /) -> None:
        """Take in more bytes."""
        ...


def write_safetensors(
    path: Path,
    specs: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    tensor: Callable[[str], Tensor],
    digest: Digest | None = None,
) -> None:
    """Write a safetensors file and wait until it is on the disk.

    Args:
        path: The file to make.
        specs: Tensor name -> shape and dtype, in the order in which they are to stand.
        tensor: Returns the tensor of a name; asked once for each, in turn.
        digest: A hash of `hashlib`, to be fed with what the file should hold.

    Raises:
        OSError: If the file cannot be written; what there is of it is left to the caller.
        ValueError: If a tensor is not as `specs` says.
    """
    # Wide dtypes first, so that every tensor starts at a multiple of its item size.
    names = sorted(specs, key=lambda name: -specs[name][1].itemsize)
    header: dict[str, object] = {"__metadata__": _METADATA}
    end = 0
    for name in names:
        shape, dtype = specs[name]
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {
            "dtype": DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with path.open("wb") as file:

        def put(data: bytes | memoryview) -> None:
            if digest is not None:
                digest.update(data)
            file.write(data)

        put(len(text).to_bytes(8, "little") + text)
        for name in names:
            put(_bytes_of(name, tensor(name), *specs[name]))
        file.flush()
        os.fsync(file.fileno())


def _bytes_of(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> memoryview:
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
        raise ValueError(
            f"{name} was announced as {dtype} {list(shape)}, but is {tensor.dtype} "
            f"{list(tensor.shape)}."
        )
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())
