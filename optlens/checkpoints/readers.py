"""Reading a checkpoint's tensors by several threads at once, converted on the way.

Loading with a conversion is mostly the system's work: it fetches new memory page by page, in the
thread that writes there first. So the readers share out batches of tensors, or of parts of large
ones; each converts its own without help from PyTorch's other threads, in one call that leaves
Python's lock to others, and no reader waits for another. A part is written by one reader, by the
same operation as in one thread, so the values do not depend on how many there are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import NamedTuple

import torch
from torch import Tensor

from optlens.checkpoints.checksums import Checksums
from optlens.checkpoints.mapped_pages import hand_back
from optlens.checkpoints.read import Weights
from optlens.checkpoints.stored_tensors import convert, stay_on_one_core

# So much is converted at a time, up to twice of it: long enough that a reader is at work while others
# hold Python's lock, as the tokenizer does for 0.05 s; short enough that an interrupt is felt at once.
PART_BYTES = 16 * 2**20
# Tensors that are put together from several files leave these in memory: after so many bytes they are
# closed and opened again. That is less than the largest tensor of any published OPT.
_RELEASE_BYTES = 16 * 2**20
# More would wait for the memory and the disk, not for each other.
_MOST_READERS = 4

Target = tuple[torch.device | str, torch.dtype]


class _Whole:
    """A tensor that is being made from parts, which may be mapped from a file with checksums."""

    def __init__(
        self,
        name: str,
        tensor: Tensor,
        n_parts: int,
        is_mapped: bool = False,
        checksums: Checksums | None = None,
    ) -> None:
        self.name, self.tensor, self.left = name, tensor, n_parts
        self.is_mapped, self.checksums = is_mapped, checksums


class _Part(NamedTuple):
    """Stored numbers, and the part of a tensor that they become."""

    whole: _Whole
    source: Tensor
    target: Tensor


def _read(parts: list[_Part], convert: Callable[[list[Tensor], list[Tensor]], None]) -> None:
    """Convert parts, have their checksums taken, and leave nothing of their files in memory."""
    converted = [part for part in parts if part.source is not part.target]
    if converted:
        for part in converted:
            if part.whole.checksums is not None:
                part.whole.checksums.note(part.source)
        convert([part.target for part in converted], [part.source for part in converted])
        hand_back(part.source for part in converted if part.whole.is_mapped)


def convert_alone(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy flat numbers into targets of other dtypes, in a thread that stays alone."""
    if torch.get_num_threads() == 1:
        torch._foreach_copy_(targets, sources)
    else:  # OpenMP was not to be found
        for target, source in zip(targets, sources, strict=True):
            convert(source, target)


def read_tensors(
    weights: Weights,
    wanted: Mapping[str, Target],
    put: Callable[[str, Tensor], None],
    n_readers: int | None = None,
    meanwhile: Callable[[], object] = lambda: None,
) -> None:
    """Read tensors, each into the device and dtype that is wanted, and hand them over.

    What has its dtype already and stays on the CPU is handed over as it is mapped from the file.

    Args:
        weights: The checkpoint.
        wanted: Canonical name of a stored tensor -> where it is to be and in which dtype.
        put: Called with name and tensor, in the calling thread, in any order of the names.
        n_readers: How many threads convert. None for as many as PyTorch computes with, at most 4;
            with one, nothing is read before `put` has returned for the tensor before.
        meanwhile: Called in the calling thread as soon as readers are at work; after all is read
            if there are none. It may hold Python's lock, which conversions leave free.

    Raises:
        CheckpointError: If a file cannot be read. All readers have ended then.
    """
    parts = _parts(weights, wanted)
    if n_readers is None:
        n_readers = min(torch.get_num_threads(), _MOST_READERS)
    if n_readers == 1 or not any(_is_converted(weights, *item) for item in wanted.items()):
        for part in parts:
            _read([part], torch._foreach_copy_)  # by all of PyTorch's threads
            part.whole.left -= 1
            if not part.whole.left:
                put(part.whole.name, part.whole.tensor)
            del part  # frees the tensor, if nobody has kept it, before the next one is read
        meanwhile()
    else:
        n_bytes = sum(map(weights.n_bytes, wanted))
        _Readers(parts, n_bytes, n_readers).run(len(wanted), put, meanwhile)


def _is_converted(weights: Weights, name: str, target: Target) -> bool:
    """Tell whether a reader has to convert a tensor on the CPU."""
    device, dtype = target
    return torch.device(device).type == "cpu" and weights.specs[name].dtype != dtype


def _parts(weights: Weights, wanted: Mapping[str, Target]) -> Iterator[_Part]:
    """Divide what is to be read, in the order of the files."""
    read_since_release = 0
    for name in weights.by_file(list(wanted)):
        device, dtype = wanted[name]
        source = weights.tensor(name)
        n_bytes = source.nbytes
        if _is_converted(weights, name, wanted[name]) and source.is_contiguous():
            target = torch.empty(source.shape, dtype=dtype, device="cpu")
            sources, targets = (
                tensor.view(-1).split(PART_BYTES // source.itemsize) for tensor in (source, target)
            )
            checksums = weights.checksums(name)
            whole = _Whole(name, target, len(sources), weights.is_mapped(name), checksums)
            del source, target
            yield from map(_Part, [whole] * len(sources), sources, targets)
            del sources, targets, whole
        else:
            placed = source.to(device).to(dtype).contiguous()
            elsewhere = placed.device != source.device or placed.data_ptr() != source.data_ptr()
            if elsewhere and source.is_contiguous() and weights.is_mapped(name):
                hand_back([source])
            del source
            yield _Part(_Whole(name, placed, 1), placed, placed)
            del placed
        read_since_release += n_bytes if weights.merges else 0
        if read_since_release > _RELEASE_BYTES:
            weights.release()
            read_since_release = 0


class _Readers:
    """Threads that take turns in finding a batch, and convert their batches at the same time."""

    def __init__(self, parts: Iterator[_Part], n_bytes: int, n_readers: int) -> None:
        self._parts, self._n_readers = parts, n_readers
        self._left = n_bytes  # of the files, which no reader has taken yet
        self._turn = threading.Lock()
        self._given_up = threading.Event()
        self._done: SimpleQueue[_Whole | BaseException] = SimpleQueue()

    def run(
        self, n_tensors: int, put: Callable[[str, Tensor], None], meanwhile: Callable[[], object]
    ) -> None:
        """Hand over all tensors; an error of a reader is raised here, when all have ended."""
        with ThreadPoolExecutor(self._n_readers, "optlens-read", stay_on_one_core) as pool:
            try:
                for _ in range(self._n_readers):
                    pool.submit(self._read)
                meanwhile()
                for _ in range(n_tensors):
                    found = self._done.get()
                    if isinstance(found, BaseException):
                        raise found
                    put(found.name, found.tensor)
                    del found
            finally:  # after an error or an interrupt the others stop at their next part
                self._given_up.set()

    def _read(self) -> None:
        try:
            while batch := self._next():
                _read(batch, convert_alone)
                self._finish(batch)
                del batch  # frees the tensors, if nobody has kept them, before the next are made
        except BaseException as error:  # raised where the tensors are waited for
            self._done.put(error)

    def _next(self) -> list[_Part]:
        """Return the next parts: `PART_BYTES` at least, but a share of the rest towards the end.

        So all readers end at the same time, and little of the files is in memory when most is read.
        """
        batch: list[_Part] = []
        taken = 0
        with self._turn:
            enough = min(PART_BYTES, self._left / (2 * self._n_readers))
            while not self._given_up.is_set() and (taken < enough or not batch):
                part = next(self._parts, None)
                if part is None:
                    break
                batch.append(part)
                taken += part.source.nbytes
            self._left -= taken
        return batch

    def _finish(self, batch: list[_Part]) -> None:
        with self._turn:
            for part in batch:
                part.whole.left -= 1
                if not part.whole.left:
                    self._done.put(part.whole)
