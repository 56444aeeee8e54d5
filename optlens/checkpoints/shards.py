"""Dividing a checkpoint over files: sizes, names, the index, and room on the disk."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optlens.checkpoints.layout import SAFETENSORS

# A file of the sharded layout.
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_ADVICE = {
    errno.ENOSPC: "The disk is full; free {size} there, or save to another disk.",
    errno.EDQUOT: "Your quota is used up; free {size} there, or save to another disk.",
    errno.EROFS: "That file system is read-only; save to another folder.",
    errno.EACCES: "You may not write there; save to another folder.",
    errno.EPERM: "You may not write there; save to another folder.",
    errno.ENOTDIR: "A part of that path is a file; save to another folder.",
    errno.EEXIST: "That is a file; name a folder.",
    errno.EISDIR: "Rename that folder, or save to another one.",
}


def parse_size(size: int | str, option: str) -> int:
    """Return a number of bytes; "5GB" are 5 * 10**9, "5GiB" 5 * 2**30.

    Args:
        size: A whole number, or a text with a unit.
        option: What to call it in an error.

    Raises:
        ValueError: If it is no size.

    Example:
        >>> parse_size("500MB", "shard_size")
        500000000
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?I?B)", str(size).upper())
    is_number = isinstance(size, int) and not isinstance(size, bool)
    n_bytes = size if is_number else found and float(found[1]) * _UNITS.get(found[2], 0)
    if not n_bytes or n_bytes < 1:
        raise ValueError(f'{option}={size!r} is no size; give bytes, or a text like "500MB".')
    return int(n_bytes)


def split(sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
    """Distribute tensors, in order, over files of at most `limit` bytes.

    Args:
        sizes: Tensor name -> bytes.
        limit: Bytes of one file; a larger tensor gets a file of its own.

    Returns:
        File name -> the tensors in it.

    Example:
        >>> split({"a": 6, "b": 3, "c": 3}, limit=8)
        {'model-00001-of-00002.safetensors': ['a'], 'model-00002-of-00002.safetensors': ['b', 'c']}
    """
    groups: list[list[str]] = [[]]
    total = 0
    for name, size in sizes.items():
        if groups[-1] and total + size > limit:
            groups.append([])
            total = 0
        groups[-1].append(name)
        total += size
    if len(groups) == 1:
        return {SAFETENSORS: groups[0]}
    count = len(groups)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": g for i, g in enumerate(groups, 1)}


def index_of(files: Mapping[str, list[str]], sizes: Mapping[str, int]) -> dict[str, Any]:
    """Return what `model.safetensors.index.json` holds.

    Args:
        files: As `split` returns them.
        sizes: Tensor name -> bytes.
    """
    weight_map = {name: file for file, names in files.items() for name in names}
    return {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}


def check_room(folder: Path, needed: int) -> None:
    """Raise an OSError unless a disk has room for so many bytes."""
    usage = shutil.disk_usage(folder)
    if usage.total and usage.free < needed:  # some network file systems report 0 for both
        raise OSError(
            errno.ENOSPC, f"{needed / 1e9:.2f} GB are needed, {usage.free / 1e9:.2f} GB are free"
        )


def advice_on(error: OSError, needed: int) -> str:
    """Say what to do about a file that could not be written; "" where nothing is known.

    Args:
        error: What the system raised.
        needed: Bytes that are still to be written.
    """
    advice = _ADVICE.get(error.errno, "").format(size=f"{needed / 1e9:.2f} GB")
    return advice + " " if advice else ""


def as_json(values: dict[str, Any]) -> str:
    """Return the text of a JSON file of a checkpoint."""
    text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    text.encode("utf-8")  # half characters show here, not when the file is half written
    return text
