"""Draw attention patterns and large sweeps as small PNG files, without matplotlib and the same on every machine.

A pattern of T tokens is a picture of at most T x T pixels that the browser enlarges, so a page with
some hundred heads stays small. The file has a palette: 64 steps of the theme's ramp and one colour for
what a causal model cannot see.
"""

import base64
import struct
import zlib

import numpy as np

from optlens.plots.draw import pool_max
from optlens.plots.style import Style, mix

_STEPS = 64


def attention_png(pattern: np.ndarray, look: Style, most: int | None = None, zoom: int = 1) -> str:
    """Return one pattern as a data URI, on a square-root scale from 0 to 1.

    Args:
        pattern: weights [query, key], NaN where the key lies in the query's future.
        look: the theme whose colours to take.
        most: shrink to at most this many pixels a side, each the largest weight of its block.
        zoom: write every cell as `zoom` x `zoom` pixels, for hosts that would blur it.
    """
    small = pattern if most is None else pool_max(pattern, most)
    share = np.sqrt(np.clip(np.nan_to_num(small), 0.0, 1.0))
    levels = np.rint(share * (_STEPS - 1)).astype(np.uint8)
    levels[np.isnan(small)] = _STEPS
    palette = [mix(look.ramp, step / (_STEPS - 1)) for step in range(_STEPS)]
    palette.append(mix((look.masked, look.masked), 0.0))
    enlarged = levels.repeat(zoom, axis=0).repeat(zoom, axis=1)
    return png_uri(_png(enlarged, palette))


def sweep_png(effect: np.ndarray, limit: float, look: Style, most: int = 1024) -> str:
    """Return a table of signed numbers as a data URI, a pixel for each cell.

    Args:
        effect: numbers [row, column]; NaN gets the colour of masked cells.
        limit: where the colours end, on both sides of zero.
        look: the theme whose colours to take.
        most: shrink to at most this many pixels a side, each the block's number furthest from zero.
    """
    above, below = (pool_max(np.maximum(sign * effect, 0.0), most) for sign in (1, -1))
    small = np.where(np.nan_to_num(above) >= np.nan_to_num(below), above, -below)
    share = np.clip(np.nan_to_num(small) / limit, -1.0, 1.0)
    levels = np.rint((share + 1) * _STEPS / 2).astype(np.uint8)  # zero is a step of its own
    levels[np.isnan(small)] = _STEPS + 1
    palette = [mix(look.diverging, step / _STEPS) for step in range(_STEPS + 1)]
    palette.append(mix((look.masked, look.masked), 0.0))
    return png_uri(_png(levels, palette))


def png_uri(data: bytes) -> str:
    """Return a PNG file as a data URI, which a page holds in itself."""
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")


def _png(levels: np.ndarray, palette: list[tuple[int, int, int]]) -> bytes:
    """Write a palette image [row, column] of uint8 as a PNG file."""
    height, width = levels.shape
    # Each line begins with its filter; 0 stands for none.
    lines = np.pad(levels, ((0, 0), (1, 0))).astype(np.uint8).tobytes()
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    colors = bytes(channel for color in palette for channel in color)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", header),
            _chunk(b"PLTE", colors),
            _chunk(b"IDAT", zlib.compress(lines, 6)),
            _chunk(b"IEND", b""),
        ]
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
