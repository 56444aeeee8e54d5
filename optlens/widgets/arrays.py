"""Numbers on their way to a browser: as bytes beside JSON, and attention as levels of one byte.

A list of numbers in JSON costs ten times its bytes and is read ten times slower. So an array becomes
a small description, `{"dtype", "shape", "data"}`, whose data is what the way at hand can carry: a
buffer in the state of a widget, the number of a buffer in a message, base64 in a page.
"""

import base64
from collections.abc import Callable
from typing import Any

import numpy as np

MASKED = 255  # the level of cells in a query's future
STEPS = 254  # the level of weight 1
_DTYPES = {"float32": "f4", "int32": "i4", "uint8": "u1"}


def packed(value: Any, carry: Callable[[memoryview], Any] = lambda data: data) -> Any:
    """Replace every array inside dicts and lists by its description.

    Args:
        value: JSON with NumPy arrays in it: float32, int32 or uint8.
        carry: turns an array's bytes into what stands in "data".

    Example:
        >>> packed({"x": np.zeros(2, np.uint8)}, len)
        {'x': {'dtype': 'u1', 'shape': [2], 'data': 2}}
    """
    if isinstance(value, dict):
        return {key: packed(item, carry) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [packed(item, carry) for item in value]
    if isinstance(value, np.ndarray):
        data = memoryview(np.ascontiguousarray(value).reshape(-1)).cast("B")
        dtype = _DTYPES[value.dtype.name]
        return {"dtype": dtype, "shape": list(value.shape), "data": carry(data)}
    return value


def with_buffers(value: Any) -> tuple[Any, list[memoryview]]:
    """Return JSON whose arrays name their buffer by number, and the buffers."""
    buffers: list[memoryview] = []

    def put(data: memoryview) -> int:
        buffers.append(data)
        return len(buffers) - 1

    return packed(value, put), buffers


def as_text(data: memoryview) -> str:
    """Return bytes as base64."""
    return base64.b64encode(data).decode("ascii")


def levels(weights: np.ndarray, future: np.ndarray) -> np.ndarray:
    """Return attention weights as uint8 on a square-root scale, `MASKED` where not to be seen.

    Args:
        weights: `[..., query, key]` in 0..1.
        future: True where nothing is to be seen, `[query, key]`.

    Example:
        >>> levels(np.array([[1.0, 0.25]]), np.array([[False, False]]))
        array([[254, 127]], dtype=uint8)
    """
    # Two roundings, to float32 and to a step, leave a weight within 0.4 % of itself.
    root = np.sqrt(np.clip(weights, 0.0, 1.0, dtype=np.float32))
    steps = np.rint(np.nan_to_num(root) * STEPS).astype(np.uint8)
    steps[..., future] = MASKED
    return steps


def pool_max(values: np.ndarray, step: int) -> np.ndarray:
    """Shrink the last two axes, each cell becoming the largest of a block of `step` x `step`.

    A mean would hide the single hot cells that one looks for.

    Example:
        >>> pool_max(np.array([[0, 3, 1], [2, 0, 0], [0, 0, 5]]), 2)
        array([[3, 1],
               [0, 5]])
    """
    if step == 1:
        return values
    rows = _pool(values, step)  # whole rows first: memory is read once, in order
    return _pool(rows.swapaxes(-1, -2), step).swapaxes(-1, -2)


def pooled_future(future: np.ndarray, step: int) -> np.ndarray:
    """Return which blocks of `pool_max` lie wholly in the future, `[query, key]`."""
    return ~pool_max(~future, step).astype(bool)


def step_for(size: int, most: int) -> int:
    """Return by how much to shrink `size` cells so that at most `most` remain."""
    return max(1, -(-size // most))


def _pool(values: np.ndarray, step: int) -> np.ndarray:
    out = values[..., ::step, :].copy()
    for offset in range(1, step):
        part = values[..., offset::step, :]
        here = out[..., : part.shape[-2], :]
        np.maximum(here, part, out=here)
    return out
