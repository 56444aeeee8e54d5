"""How much memory there is, and how to say so."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
NO_LIMIT = 2**60  # the first version of the interface writes a number of this size for none
# (limit, in use, statistics) of a container: version 2 of the interface, then version 1.
_CGROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)


def available_bytes(device: torch.device | str) -> int | None:
    """Return how many bytes a device can still give, or None where the system does not say.

    On the CPU this counts what the system would reclaim from its file cache, and respects the
    limit of a container. Where only the size of the memory is known (macOS), returns that.

    Example:
        >>> available_bytes("cpu") is None or available_bytes("cpu") > 0
        True
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _available_main_memory() if device.type == "cpu" else None


def _available_main_memory() -> int | None:
    free = [_from_meminfo(), *(_from_cgroup(*names) for names in _CGROUP_FILES)]
    known = [value for value in free if value is not None]
    if known:
        return min(known)
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _from_meminfo() -> int | None:
    fields = (_read(_MEMINFO) or "").partition("MemAvailable:")[2].split()
    return int(fields[0]) * 1024 if fields else None


def _from_cgroup(limit: str, used: str, statistics: str) -> int | None:
    text = _read(_CGROUP / limit)
    if text is None or not text.strip().isdigit() or int(text) >= NO_LIMIT:  # or it says "max"
        return None
    fields = dict(line.split() for line in (_CGROUP / statistics).read_text().splitlines())
    # Cached file pages count as used here, though the system gives them up when asked.
    reclaimable = int(fields.get("inactive_file", 0))
    return max(0, int(text) - int((_CGROUP / used).read_text()) + reclaimable)


def _read(path: Path) -> str | None:
    try:
        with open(path, encoding="ascii") as file:
            return file.read()
    except FileNotFoundError:
        return None


def describe_bytes(n: int) -> str:
    """Write a number of bytes for people: "1.5 GB"."""
    size = float(n)
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
