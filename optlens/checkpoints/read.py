"""Reading tensors out of a checkpoint's files, one at a time.

`Weights` is a checkpoint as a mapping from canonical tensor names (see `layout`) to tensors,
whatever the files are. Safetensors files and zip `.bin` files are mapped into memory: a tensor
that comes out costs no memory until it is read, and then the system may drop its pages again.
Such a tensor is private to the process (writing into it leaves the file alone), but stays tied to
the file's contents: replacing the file is safe, cutting it short in place is not.
"""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from optlens.checkpoints.checksums import Checksums
from optlens.checkpoints.errors import CheckpointError, listing
from optlens.checkpoints.layout import Layout, canonical, what_else
from optlens.files import type_of

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_TORCH_DTYPES = frozenset(_SAFETENSORS_DTYPES.values())
_AGAIN = "Download the file again, or save the checkpoint again."


class TensorSpec(NamedTuple):
    """What is known of a stored tensor before reading it; dtype None is not one that a model can have."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None


class TensorFile(Protocol):
    """One open file of tensors under their stored names."""

    # Whether closing and opening again costs little, as the file is only mapped into memory.
    mapped: bool

    def names(self) -> list[str]:
        """Return the stored tensor names."""
        ...

    def spec(self, name: str) -> TensorSpec:
        """Return shape and dtype of a stored tensor."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """Return a stored tensor."""
        ...


class SafetensorsFile:
    """An open safetensors file."""

    mapped = True

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            self._file = safe_open(str(path), framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            reason = what_else(path) or f"{error}; the file is cut short or damaged"
            raise CheckpointError(
                f"{path} cannot be read as safetensors: {reason}. {_AGAIN}"
            ) from error

    def names(self) -> list[str]:
        """Return the stored tensor names."""
        return list(self._file.keys())

    def spec(self, name: str) -> TensorSpec:
        """Return shape and dtype of a stored tensor."""
        view = self._file.get_slice(name)
        return TensorSpec(tuple(view.get_shape()), _SAFETENSORS_DTYPES.get(view.get_dtype()))

    def tensor(self, name: str) -> torch.Tensor:
        """Return a stored tensor, mapped from the file."""
        from safetensors import SafetensorError

        try:
            return self._file.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(
                f"{self.path}: {name!r} cannot be read: {error}. {_AGAIN}"
            ) from error


class TorchFile:
    """An open `.bin` file, unpickled without running any code that it may hold."""

    def __init__(self, path: Path, verify: bool) -> None:
        """Read which tensors there are.

        Args:
            path: The file.
            verify: Compare it with its checksums: now what says which tensors there are, and their
                values when `compare` is called with `take_checksums()`.

        Raises:
            CheckpointError: If the file is damaged, or holds something else.
        """
        self.path = path
        try:
            with path.open("rb") as file:
                # Before PyTorch 1.6 files were plain pickles, which cannot be mapped into memory.
                self.mapped = file.read(4) == b"PK\x03\x04"
        except OSError as error:
            raise _unreadable(path, error) from error
        self._checksums = _read_checksums(path) if verify and self.mapped else None
        self._tensors = self._load()
        for name, value in self._tensors.items():
            self._check(name, value)
        if self._checksums is not None:
            self.place(self._checksums)

    def place(self, checksums: Checksums) -> None:
        """Say where the file is mapped, for whoever has its checksums taken while reading."""
        checksums.place(self._tensors)

    def take_checksums(self) -> Checksums | None:
        """Return the checksums that are still to be compared, for `compare`; None the next time."""
        checksums, self._checksums = self._checksums, None
        return checksums

    def _check(self, name: object, value: object) -> None:
        """Raise unless it is a name and a tensor whose values lie in the file, one by one."""
        instead = None
        if not isinstance(name, str):
            instead = f"the key {name!r} is {type_of(name)}, not a name"
        elif not isinstance(value, torch.Tensor):
            instead = f"{name!r} is {type_of(value)}, not a tensor"
        if instead is not None:
            raise CheckpointError(
                f"{self.path}: {instead}. This is no table of named tensors; save the model's "
                "state_dict() instead."
            )
        if value.is_meta or value.layout != torch.strided:
            kind = "has no values (it was saved from the meta device)"
            if not value.is_meta:
                kind = f"is stored as {value.layout}, not in full"
            raise CheckpointError(
                f"{self.path}: {name!r} {kind}. Save the model again, with dense weights."
            )

    def _load(self) -> dict[str, torch.Tensor]:
        try:
            values = torch.load(
                self.path, map_location="cpu", weights_only=True, mmap=self.mapped or None
            )
        except Exception as error:  # there is no end to the ways in which a damaged pickle fails
            is_refusal = isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error)
            if is_refusal and what_else(self.path) is None:
                line = next(line for line in str(error).splitlines() if "GLOBAL" in line)
                raise CheckpointError(
                    f"{self.path} was refused, as loading it would run code that it holds: "
                    f"{line.strip()} Weights need no code; use a safetensors version of the "
                    "checkpoint, or get it from a source that you trust."
                ) from error
            raise _unreadable(self.path, str(error).partition(". ")[0]) from error
        if not isinstance(values, dict):
            raise CheckpointError(
                f"{self.path} holds {type_of(values)}, not a table of named tensors. "
                "Save the model's state_dict() instead."
            )
        return values

    def names(self) -> list[str]:
        """Return the stored tensor names."""
        return list(self._tensors)

    def spec(self, name: str) -> TensorSpec:
        """Return shape and dtype of a stored tensor."""
        tensor = self._tensors[name]
        dtype = tensor.dtype if tensor.dtype in _TORCH_DTYPES else None
        return TensorSpec(tuple(tensor.shape), dtype)

    def tensor(self, name: str) -> torch.Tensor:
        """Return a stored tensor; mapped from the file if that is a zip file."""
        return self._tensors[name].detach()


def _read_checksums(path: Path) -> Checksums:
    """Read a file's checksums, and compare all but the values of tensors."""
    try:
        checksums = Checksums(path)
        damaged = checksums.damaged_structure()
    except Exception as error:  # a damaged directory makes zipfile fail in many ways
        raise _unreadable(path, error) from error
    if damaged is not None:
        raise _corrupted(path, f"its part {damaged!r}")
    return checksums


def compare(checksums: Checksums | None) -> None:
    """Compare the values of a file's tensors with its checksums, as far as that is not done.

    Raises:
        CheckpointError: If a tensor is damaged; those that share its part are named.
    """
    if checksums is None:
        return
    try:
        damaged = checksums.damaged()
    except OSError as error:
        raise _unreadable(checksums.path, error) from error
    if damaged:
        raise _corrupted(checksums.path, listing([repr(name) for name in damaged]))


def _corrupted(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: {what} is corrupted (its checksum does not match). {_AGAIN}")


def _unreadable(path: Path, error: Exception | str) -> CheckpointError:
    reason = what_else(path) or (
        f"{str(error) or 'it ends too early'}; the file is cut short or damaged"
    )
    return CheckpointError(f"{path} cannot be read: {reason}. {_AGAIN}")


class Weights:
    """A checkpoint's tensors by canonical name, with at most one file read into memory at a time.

    Attributes:
        layout: Where the tensors come from.
        specs: Canonical name -> shape and dtype, in the order of the files.
    """

    def __init__(self, layout: Layout, compare_later: bool = False) -> None:
        """Find out which tensors there are.

        Args:
            layout: Where they are.
            compare_later: Leave the values in `.bin` files to be compared with their checksums by
                `finish_checks`; call it before you rely on them. Otherwise they are compared first.

        Raises:
            CheckpointError: If a file cannot be read.
        """
        self.layout = layout
        self._compare_later = compare_later
        self._unfinished: dict[Path, Checksums] = {}
        self.specs: dict[str, TensorSpec] = {}
        self._where: dict[str, tuple[Path, str]] = {}
        self._verified: set[Path] = set()
        self._open: tuple[Path, TensorFile] | None = None
        for path in layout.files[:1] if layout.format == "metaseq" else layout.files:
            self._read_names(path)
        self._check_index()

    def _read_names(self, path: Path) -> None:
        file = self._file(path)
        for stored in file.names():
            name = canonical(stored)
            if name is None:
                continue
            if (
                self.layout.weight_map
                and self.layout.weight_map.get(stored, path.name) != path.name
            ):
                continue  # a copy in a shard that the index does not point to
            if name in self._where:
                other, other_stored = self._where[name]
                raise CheckpointError(
                    f"{path}: {stored!r} is the same tensor as {other_stored!r} in {other.name}. "
                    "Remove one of them; optlens cannot know which is right."
                )
            self._where[name] = (path, stored)
            self.specs[name] = file.spec(stored)

    def _check_index(self) -> None:
        for stored, file in (self.layout.weight_map or {}).items():
            name = canonical(stored)
            if name is not None and name not in self._where:
                raise CheckpointError(
                    f"{self.layout.folder / file}: {stored!r} is missing, although the index says "
                    "that it is there. Index and weight files come from different saves; download "
                    "all of them again."
                )

    def _file(self, path: Path) -> TensorFile:
        if self._open is None or self._open[0] != path:
            self._open = None  # close the other file before opening this one
            verify = path not in self._verified
            if self.layout.format == "safetensors":
                self._open = (path, SafetensorsFile(path))
            elif self.layout.format == "metaseq":
                from optlens.checkpoints.metaseq import MetaseqFile  # which builds on this module

                self._open = (path, MetaseqFile(self.layout.files, verify))
            else:
                self._open = (path, self._torch_file(path, verify))
            self._verified.add(path)
        return self._open[1]

    def _torch_file(self, path: Path, verify: bool) -> TorchFile:
        file = TorchFile(path, verify)
        checksums = file.take_checksums()
        if checksums is not None and self._compare_later:
            self._unfinished[path] = checksums
        elif checksums is not None:
            compare(checksums)
        elif path in self._unfinished:  # opened again, so mapped to another place
            file.place(self._unfinished[path])
        return file

    def checksums(self, name: str) -> Checksums | None:
        """Return what takes note of a tensor's values while they are read, if they have checksums.

        Its notes are of tensors from the file that was opened last.
        """
        return self._unfinished.get(self._where[name][0])

    @property
    def merges(self) -> bool:
        """Whether tensors are put together from several files, and so are never mapped."""
        return self.layout.format == "metaseq" and len(self.layout.files) > 1

    def is_mapped(self, name: str) -> bool:
        """Tell whether a tensor comes out as a view of its file, mapped into memory."""
        return not self.merges and self._file(self._where[name][0]).mapped

    def where(self, name: str) -> str:
        """Return file and stored name of a tensor, for a message."""
        path, stored = self._where[name]
        return f"{path}: {stored!r}"

    def stored_name(self, name: str) -> str:
        """Return a tensor's name as its file spells it."""
        return self._where[name][1]

    def location(self, name: str) -> tuple[Path, str]:
        """Return the file that holds a tensor, and its name in there."""
        return self._where[name]

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor by its canonical name, on the CPU, in its stored dtype."""
        path, stored = self._where[name]
        return self._file(path).tensor(stored)

    def n_bytes(self, name: str) -> int:
        """Return the bytes that a tensor takes in its file."""
        shape, dtype = self.specs[name]
        return math.prod(shape) * (0 if dtype is None else dtype.itemsize)

    def by_file(self, names: list[str]) -> list[str]:
        """Return `names` sorted so that every file is opened once."""
        order = {path: number for number, path in enumerate(self.layout.files)}
        return sorted(names, key=lambda name: order[self._where[name][0]])

    def finish_checks(self) -> None:
        """Compare the files that were opened with their checksums, as far as that is not done.

        Raises:
            CheckpointError: If one is damaged.
        """
        while self._unfinished:
            compare(self._unfinished.pop(next(iter(self._unfinished))))

    def release(self) -> None:
        """Let go of the open file's pages, where opening it again costs little."""
        if self._open is not None and self._open[1].mapped:
            self._open = None
