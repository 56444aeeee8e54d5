"""Comparing the parts of a zip file with the checksums that are stored with them."""

from __future__ import annotations

import mmap
import struct
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

# So much of a file is in memory at a time, in each thread, while checksums are compared.
CHECKED_BYTES = 4 * 2**20


@contextmanager
def check_pool() -> Iterator[Executor]:
    """Have threads for comparisons; those that were not begun at the end are given up."""
    pool = ThreadPoolExecutor(min(torch.get_num_threads(), 4), "optlens-check")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


class Checksums:
    """The checksums of a file, on their way to be compared.

    Attributes:
        damaged_early: The name of the first damaged part, if that is known at once: all but the
            values of tensors are compared before anybody reads them.
    """

    def __init__(self, path: Path, pool: Executor) -> None:
        """Compare what is small, and have the values of tensors compared.

        Args:
            path: A zip file of `torch.save`.
            pool: Who compares the values of tensors, in the order of the file.

        Raises:
            Exception: If the directory of the file is damaged, in many ways.
        """
        self.damaged_early: str | None = None
        self._running: list[tuple[zipfile.ZipInfo, Future[bool]]] = []
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if not any(entry.CRC for entry in entries):
                return  # written with PyTorch's checksums switched off
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                self.damaged_early = archive.testzip()
                return
        with path.open("rb") as file:
            self._whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        for entry in entries:
            if is_of_a_tensor(entry.filename):
                self._running.append((entry, pool.submit(_is_intact, self._whole, entry)))
            elif self.damaged_early is None and not _is_intact(self._whole, entry):
                self.damaged_early = entry.filename

    def damaged_part(self) -> str | None:
        """Wait until all is compared; return the name of the first damaged part."""
        intact = [(entry.filename, running.result()) for entry, running in self._running]
        return next((name for name, good in intact if not good), self.damaged_early)


def is_of_a_tensor(part: str) -> bool:
    """Tell whether a part of a file holds the values of tensors."""
    return part.rpartition("/data/")[2].isdigit()


def _is_intact(whole: mmap.mmap, entry: zipfile.ZipInfo) -> bool:
    """Tell whether a part of a mapped zip file has the checksum that is stored with it."""
    header = whole[entry.header_offset : entry.header_offset + 30]
    start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
    end, checksum = start + entry.file_size, 0
    for at in range(start, end, CHECKED_BYTES):
        stop = min(at + CHECKED_BYTES, end)
        with memoryview(whole) as view, view[at:stop] as piece:
            checksum = zlib.crc32(piece, checksum)
        if hasattr(mmap, "MADV_DONTNEED"):  # else they count as this process's memory
            page = at - at % mmap.PAGESIZE
            whole.madvise(mmap.MADV_DONTNEED, page, stop - page)
    return header[:4] == b"PK\x03\x04" and checksum == entry.CRC
