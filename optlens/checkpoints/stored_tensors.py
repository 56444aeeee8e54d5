"""Reading stored tensors piece by piece into memory that is already there.

Mapping a file, as `read.py` does, leaves it to the system what is in memory and for how long. Here
every byte is asked for, lands where it is wanted, converted on the way if it must be, and the
system is told that it need not keep a copy. So reading a file of any size takes one buffer.
"""

from __future__ import annotations

import ctypes
import json
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from optlens.checkpoints.errors import CheckpointError
from optlens.checkpoints.read import Weights

# Large enough that the disk never waits for Python, small enough that an interrupt is felt at once.
PIECE_BYTES = 8 * 2**20
# PyTorch divides longer conversions among threads, which the running block has better use for.
# In steps of this length a conversion takes twice the time, so a thread is told to stay alone first.
_ONE_THREAD = 32_704
ALIGNMENT = 64


class Stopped(Exception):
    """Reading was given up because nobody waits for it any more."""


class _Place(NamedTuple):
    """Where a tensor's bytes lie."""

    file: _File
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class _Piece(NamedTuple):
    """Bytes of a tensor, and the part of a target that they fill."""

    file: _File
    start: int
    dtype: torch.dtype
    target: Tensor


class StoredTensors:
    """Some tensors of a checkpoint in safetensors files, which stay open.

    Open files stay readable when they are deleted or replaced by a rename. One that is changed in
    place is refused from then on.
    """

    def __init__(self, weights: Weights, names: Iterable[str]) -> None:
        """Find where the tensors lie.

        Args:
            weights: The checkpoint.
            names: Canonical names of the tensors that will be read.

        Raises:
            CheckpointError: If the checkpoint is not in safetensors files.
        """
        if weights.layout.format != "safetensors":
            raise CheckpointError(
                f'device_map="stream" reads safetensors, but {weights.layout.folder} holds '
                f"{weights.layout.files[0].name}. Write it anew once, with `optlens convert` or "
                "save_pretrained, and stream that."
            )
        self._places: dict[str, _Place] = {}
        files: dict[Path, _File] = {}
        for name in names:
            path, stored = weights.location(name)
            if path not in files:
                files[path] = _File(path)
            spec = weights.specs[name]
            self._places[name] = _Place(
                files[path], files[path].start_of(stored), spec.shape, spec.dtype
            )
        order = {path: number for number, path in enumerate(weights.layout.files)}
        self._spare: list[Tensor] = []  # buffers for the next who reads: new memory takes time
        self._order = {name: (order[p.file.path], p.start) for name, p in self._places.items()}

    def in_file_order(self, names: Iterable[str]) -> list[str]:
        """Return names as they come in the files, so that the disk reads without leaps."""
        return sorted(names, key=self._order.__getitem__)

    def nbytes(self, names: Iterable[str]) -> int:
        """Return how many bytes some tensors take in the files."""
        places = (self._places[name] for name in names)
        return sum(torch.Size(p.shape).numel() * p.dtype.itemsize for p in places)

    def fill(
        self, targets: Mapping[str, Tensor], stopped: Callable[[], bool] = lambda: False
    ) -> None:
        """Fill contiguous tensors of one dtype and device with stored ones.

        Where numbers are converted on the CPU, one thread converts a piece while another reads the
        next one.

        Args:
            targets: Canonical name to what to fill, of the stored shape.
            stopped: Asked between pieces; True gives up.

        Raises:
            CheckpointError: If a file cannot be read or has changed.
            Stopped: If `stopped` said so.
        """
        pieces, turn, given_up = self._pieces(targets), threading.Lock(), threading.Event()

        def read_one(buffer: Tensor) -> tuple[Tensor, Tensor] | None:
            with turn:  # pieces are read in their order, one at a time
                piece = None if given_up.is_set() else next(pieces, None)
                if piece is None:
                    return None
                if stopped():
                    raise Stopped
                raw = target = piece.target
                if target.dtype != piece.dtype or target.device.type != "cpu":
                    raw = buffer.view(piece.dtype)[: target.numel()]
                piece.file.read(piece.start, raw)
                return raw, target

        def work() -> None:
            buffer = self._spare_buffer()
            try:
                while (found := read_one(buffer)) is not None:
                    raw, target = found
                    if raw is not target:
                        convert(raw, target)
            except BaseException:
                given_up.set()
                raise
            finally:
                self._spare.append(buffer)

        if not any(self._converts(name, target) for name, target in targets.items()):
            work()
            return
        with ThreadPoolExecutor(2, "optlens-read", stay_on_one_core) as pool:
            both = [pool.submit(work), pool.submit(work)]
            try:
                for each in both:
                    each.result()
            except BaseException:  # an interrupt, too
                given_up.set()
                raise

    def _pieces(self, targets: Mapping[str, Tensor]) -> Iterator[_Piece]:
        """Divide what is to be read, in the order of the files."""
        for name in self.in_file_order(targets):
            file, start, _, dtype = self._places[name]
            for part in targets[name].detach().view(-1).split(PIECE_BYTES // dtype.itemsize):
                yield _Piece(file, start, dtype, part)
                start += part.numel() * dtype.itemsize

    def _converts(self, name: str, target: Tensor) -> bool:
        """Tell whether filling a target takes a second thread's time."""
        return target.device.type == "cpu" and target.dtype != self._places[name].dtype

    def _spare_buffer(self) -> Tensor:
        try:
            return self._spare.pop()
        except IndexError:
            return aligned(PIECE_BYTES, torch.uint8)

    def read(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a stored tensor in memory of its own, which starts at a multiple of 64 bytes."""
        target = aligned(self._places[name].shape, dtype, device)
        self.fill({name: target})
        return target


def aligned(
    shape: int | tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Tensor:
    """Return an empty tensor whose memory starts at a multiple of 64 bytes.

    The last bits of a float32 product depend on where its matrix starts, so weights that are to
    give the same numbers every time must lie alike.

    Example:
        >>> aligned((3, 5), torch.float16).data_ptr() % 64
        0
    """
    n_elements = torch.Size([shape] if isinstance(shape, int) else shape).numel()
    spare = ALIGNMENT // dtype.itemsize
    whole = torch.empty(n_elements + spare, dtype=dtype, device=device)
    skipped = -whole.data_ptr() % ALIGNMENT // dtype.itemsize
    return whole[skipped : skipped + n_elements].view(shape)


@cache
def _openmp() -> ctypes.CDLL:
    return ctypes.CDLL(torch._C.__file__)  # knows the OpenMP that PyTorch came with


def stay_on_one_core() -> None:
    """Have what PyTorch computes in this thread not be divided among threads.

    `torch.set_num_threads` would say so for every thread that begins later, too. Where OpenMP is
    not to be found nothing changes, and `convert` goes on in small steps.
    """
    torch.get_num_threads()  # this is when a new thread is told the common number
    with suppress(OSError, AttributeError):
        _openmp().omp_set_num_threads(1)


def convert(raw: Tensor, target: Tensor) -> None:
    """Copy flat numbers into a target of another dtype, in a thread that stays alone."""
    if target.device.type != "cpu" or torch.get_num_threads() == 1:
        target.copy_(raw)
        return
    for source, place in zip(raw.split(_ONE_THREAD), target.split(_ONE_THREAD), strict=True):
        place.copy_(source)


class _File:
    """An open safetensors file, read by one caller at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            self._file = path.open("rb", buffering=0)
            weakref.finalize(self, self._file.close)
            self._stamp = self._now()
            length = int.from_bytes(self._file.read(8), "little")
            self._header = json.loads(self._file.read(length))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}. Download it again.") from error
        self._data = 8 + length
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def start_of(self, stored: str) -> int:
        """Return where a tensor's bytes begin."""
        return self._data + self._header[stored]["data_offsets"][0]

    def _now(self) -> tuple[int, int]:
        """Return what changes when somebody writes into the file."""
        state = os.fstat(self._file.fileno())
        return state.st_size, state.st_mtime_ns

    def read(self, start: int, target: Tensor) -> None:
        """Fill a flat CPU tensor with the bytes from `start` on, and let the system forget them."""
        memory = memoryview(target.view(torch.uint8).numpy())
        with self._lock:
            try:
                if self._now() != self._stamp:
                    raise CheckpointError(
                        f"{self.path} was changed since the model was loaded, so its weights may "
                        "be of two kinds by now. Load the model again."
                    )
                self._file.seek(start)
                done = 0
                while done < len(memory):
                    count = self._file.readinto(memory[done:])
                    if not count:
                        raise CheckpointError(
                            f"{self.path} ends {len(memory) - done} bytes too early: it was cut "
                            "short. Download the file again, or save the checkpoint again."
                        )
                    done += count
                self._forget(start, len(memory))
            except OSError as error:
                raise CheckpointError(
                    f"{self.path} cannot be read at byte {start}: {error.strerror or error}. Is "
                    "the disk or the network drive still there? Running again reads it again."
                ) from error

    def _forget(self, start: int, length: int) -> None:
        """Drop what was read from the system's file cache; it will not be wanted soon."""
        if hasattr(os, "posix_fadvise"):
            # Asking for the next piece ahead (POSIX_FADV_WILLNEED) would take three times as long:
            # the system reads ahead by itself, in larger pages.
            # The system keeps large pages that reach beyond what is dropped: they go with the next.
            first, end = max(0, start - PIECE_BYTES), start + length
            os.posix_fadvise(self._file.fileno(), first, end - first, os.POSIX_FADV_DONTNEED)
