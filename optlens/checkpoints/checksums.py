"""Comparing the parts of a zip file with the checksums that are stored with them.

Whoever reads tensors from a mapped file has their bytes at hand anyway, and takes their checksums
on the way. What nobody has read is read at the end.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, NamedTuple

import torch
from torch import Tensor
from zlib_ng.zlib_ng import crc32, crc32_combine

# So much of a file is read at a time to compare it, in each thread: it stays in the processor's cache.
_STEP_BYTES = 2**20
_LOCAL_HEADER = 30


class _Part(NamedTuple):
    """A part of the file, which lies there from `start` to `end`."""

    name: str
    start: int
    end: int
    checksum: int


class _Piece(NamedTuple):
    """Bytes that were read, up to `end`, and their checksum."""

    end: int
    checksum: int


class Checksums:
    """The checksums of a file, on their way to be compared.

    Attributes:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        """Read which checksums there are.

        Args:
            path: A zip file of `torch.save`.

        Raises:
            Exception: If the directory of the file is damaged, in many ways.
        """
        self.path = path
        self._names: dict[int, list[str]] = {}  # where a part starts -> the tensors in it
        self._address: int | None = None
        self._noted: dict[int, _Piece] = {}  # by where they start
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            self._compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if not any(entry.CRC for entry in entries):
            entries = []  # written with PyTorch's checksums switched off
        with path.open("rb", buffering=0) as file:
            self._parts = [_part(file, entry) for entry in entries]

    def damaged_structure(self) -> str | None:
        """Return the name of the first damaged part of those that hold no values of tensors."""
        if self._compressed:
            self._parts = []
            with zipfile.ZipFile(self.path) as archive:
                return archive.testzip()
        rest = [part for part in self._parts if not _is_of_a_tensor(part)]
        self._parts = [part for part in self._parts if _is_of_a_tensor(part)]
        return next((part.name for part in rest if not self._is_intact(part)), None)

    def place(self, tensors: Mapping[str, Tensor]) -> None:
        """Learn where in memory the file is mapped now, and which part holds which tensors.

        Args:
            tensors: Name -> tensor, mapped from the file.
        """
        storages: dict[int, list[str]] = {}
        sizes: dict[int, int] = {}
        for name, tensor in tensors.items():
            storage = tensor.untyped_storage()
            if storage.nbytes():
                storages.setdefault(storage.data_ptr(), []).append(name)
                sizes[storage.data_ptr()] = storage.nbytes()
        parts = {part.start: part.end - part.start for part in self._parts}
        first = min(sizes, default=0)
        fitting = [
            first - start
            for start in parts
            if all(parts.get(at - first + start) == size for at, size in sizes.items())
        ]
        self._address = fitting[0] if len(fitting) == 1 else None
        if self._address is not None:
            self._names = {at - self._address: names for at, names in storages.items()}

    def note(self, numbers: Tensor) -> None:
        """Take the checksum of numbers that are being read.

        Args:
            numbers: Contiguous, mapped from the file where `place` has found it.
        """
        if self._address is not None and numbers.numel():
            start = numbers.data_ptr() - self._address
            checksum = crc32(numbers.view(-1).view(torch.uint8).numpy())
            self._noted[start] = _Piece(start + numbers.nbytes, checksum)

    def damaged(self) -> list[str]:
        """Compare the values of tensors; return the names of those in the first damaged part."""
        # What does not fit is read, too: nobody is told of damage that is not in the file.
        left = [part for part in self._parts if not self._is_noted(part)]
        with ThreadPoolExecutor(min(torch.get_num_threads(), 4), "optlens-check") as pool:
            try:
                for part, intact in zip(left, pool.map(self._is_intact, left), strict=True):
                    if not intact:
                        return self._names.get(part.start, [part.name])
            finally:  # the others are of no interest
                pool.shutdown(cancel_futures=True)
        return []

    def _is_noted(self, part: _Part) -> bool:
        """Tell whether all of a part was noted, with its checksum."""
        at, checksum = part.start, 0
        while at < part.end and at in self._noted:
            piece = self._noted[at]
            checksum = crc32_combine(checksum, piece.checksum, piece.end - at)
            at = piece.end
        return at == part.end and checksum == part.checksum

    def _is_intact(self, part: _Part) -> bool:
        """Read a part, and tell whether it has its checksum."""
        buffer = memoryview(bytearray(min(_STEP_BYTES, part.end - part.start)))
        checksum, left = 0, part.end - part.start
        with self.path.open("rb", buffering=0) as file:
            file.seek(part.start)
            while left:
                count = file.readinto(buffer[:left])
                if not count:
                    return False  # it lies outside of the file
                checksum = crc32(buffer[:count], checksum)
                left -= count
        return checksum == part.checksum


def _part(file: IO[bytes], entry: zipfile.ZipInfo) -> _Part:
    """Find where a part's bytes lie: behind a header of its own, of which only the end varies."""
    file.seek(entry.header_offset)
    header = file.read(_LOCAL_HEADER)
    if header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"the header of {entry.filename!r} is damaged")
    start = entry.header_offset + _LOCAL_HEADER + sum(struct.unpack("<HH", header[26:]))
    return _Part(entry.filename, start, start + entry.file_size, entry.CRC)


def _is_of_a_tensor(part: _Part) -> bool:
    return part.name.rpartition("/data/")[2].isdigit()
