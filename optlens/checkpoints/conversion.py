"""Turning a checkpoint of any readable layout into sharded safetensors.

Tensors go from the source to the new files one at a time. A manifest, `conversion.json`, beside the
new files says what they are made from and has the checksum of every finished one, so a conversion
that was interrupted is taken up where it stopped. Every file is read back from the disk in the end
and compared with what was read from the source; only then are the index and the config written,
without which the folder is no checkpoint.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optlens.checkpoints.config_file import read_config
from optlens.checkpoints.conversion_files import write_rest
from optlens.checkpoints.errors import CheckpointError, listing
from optlens.checkpoints.hub import locate
from optlens.checkpoints.layout import find_layout
from optlens.checkpoints.load import build_and_match
from optlens.checkpoints.manifest import Manifest, sha256_of, source_files
from optlens.checkpoints.matching import HEAD
from optlens.checkpoints.placement import parse_dtype
from optlens.checkpoints.read import Weights
from optlens.checkpoints.safetensors_file import write_safetensors
from optlens.checkpoints.shards import advice_on, check_room, parse_size, split
from optlens.config import OPTConfig
from optlens.files import replacing
from optlens.memory import describe_bytes
from optlens.model import OPTForCausalLM, OPTModel
from optlens.progress import progress_bar

if TYPE_CHECKING:
    from tqdm import tqdm

# After so many bytes the source's pages are given back.
_RELEASE_BYTES = 64 * 2**20
# Tensors of models that classify or answer questions, which are carried over as they are.
_OTHER_HEADS = ("score.weight", "qa_outputs.weight", "qa_outputs.bias")


@dataclass(frozen=True)
class Conversion:
    """What a conversion has made. `print(conversion)` reads well.

    Attributes:
        folder: The new checkpoint.
        checksums: Weight file -> its SHA-256; also in the folder's `conversion.json`.
        bytes: Size of all weights.
        dtype: Of all weights.
        kept: How many files were there, finished, from an earlier call.
    """

    folder: Path
    checksums: dict[str, str]
    bytes: int
    dtype: torch.dtype
    kept: int

    def __str__(self) -> str:
        """Describe the result in a line."""
        files = len(self.checksums)
        earlier = f", of which {self.kept} from an earlier run" if self.kept else ""
        return (
            f"{self.folder}: {describe_bytes(self.bytes)} of "
            f"{str(self.dtype).removeprefix('torch.')} in {files} file{'s' * (files > 1)}{earlier}, "
            "read back and compared"
        )


@dataclass(frozen=True)
class _Task:
    """What is to be written.

    Attributes:
        weights: The source.
        config: Its config.
        source_of: New tensor name -> canonical name in the source.
        dtype: Of all new tensors.
        files: New file -> names of the tensors in it.
    """

    weights: Weights
    config: OPTConfig
    source_of: dict[str, str]
    dtype: torch.dtype
    files: dict[str, list[str]]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.weights.specs[self.source_of[name]].shape

    def size(self, name: str) -> int:
        return math.prod(self.shape(name)) * self.dtype.itemsize

    def bytes_of(self, files: list[str]) -> int:
        return sum(self.size(name) for file in files for name in self.files[file])


def convert(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    dtype: str | torch.dtype | None = None,
    shard_size: int | str = "5GB",
    restart: bool = False,
    revision: str | None = None,
    progress: bool = True,
) -> Conversion:
    """Write a checkpoint anew as safetensors, in shards with an index.

    Reads every layout that `load_model` reads, Meta's original files among them. At most one
    tensor is in memory. Interrupted by anything, the same call goes on where it stopped; finished
    files are compared with their checksums and not written again.

    Args:
        src: A checkpoint folder, or a Hub id.
        dst: The folder to write; made if it does not exist.
        dtype: Of the new weights; what is stored unless given.
        shard_size: Bytes in one weight file, as a number or like "500MB"; a larger tensor gets a
            file of its own.
        restart: Throw away what an earlier conversion, of something else, has left in `dst`.
        revision: Branch, tag or commit on the Hub.
        progress: Show a progress bar.

    Returns:
        What was made, with checksums.

    Raises:
        CheckpointError: If the source cannot be read, a value does not fit the dtype, `dst` holds
            something else, or cannot be written. What is finished is kept.
        ValueError: If `dtype` or `shard_size` is not one.

    Example:
        >>> from optlens import demo
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made = convert(demo.path(), folder, dtype="bfloat16", progress=False)
        >>> made.dtype
        torch.bfloat16
    """
    wanted = parse_dtype(dtype) if dtype is not None else None
    limit = parse_size(shard_size, "shard_size")
    folder, target = locate(src, revision, progress), _target(dst)
    if target.exists() and target.samefile(folder):
        raise CheckpointError(f"The source and the target are one folder, {folder}; name another.")
    task = _plan(folder, wanted, limit)
    try:
        with _folder_alone(target):
            manifest = Manifest.begin(
                target, source_files(folder), str(task.dtype), limit, task.files, restart
            )
            kept = len(manifest.done)
            with manifest.dropped_if_in_vain():
                if not manifest.complete:
                    _write_shards(task, target, manifest, progress)
                    _check_source(folder, manifest)
                    write_rest(folder, target, task.config, task.dtype, task.files, task.size)
                    manifest.finish()
    except OSError as error:
        raise CheckpointError(_not_written(task, target, error)) from error
    total = task.bytes_of(list(task.files))
    return Conversion(target, dict(manifest.done), total, task.dtype, kept)


def _target(dst: str | os.PathLike) -> Path:
    if not os.fspath(dst):
        raise CheckpointError('There is no folder named ""; the current folder is ".".')
    target = Path(dst).expanduser()
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file; name a folder to write the checkpoint to.")
    return target


# ------------------------------------------------------------------------------ what to write


def _plan(folder: Path, dtype: torch.dtype | None, limit: int) -> _Task:
    """Match the source with its config, and divide it over files."""
    config, weights = read_config(folder), Weights(find_layout(folder))
    heads = [name for name in _OTHER_HEADS if name in weights.specs]
    headless = not config.tie_word_embeddings and HEAD not in weights.specs
    cls = OPTModel if heads or headless else OPTForCausalLM
    _, _, stored = build_and_match(cls, config, weights)
    if any(weights.specs[name].dtype is None for name in heads):
        raise CheckpointError(
            f"{weights.where(heads[0])} does not hold floating point numbers that optlens reads."
        )
    sources = [*stored.values(), *heads]
    if not config.tie_word_embeddings and HEAD in weights.specs and HEAD not in sources:
        sources.append(HEAD)
    canonical = {source: name for name, source in stored.items()}
    source_of = {}
    for source in weights.by_file(sources):
        name = canonical.get(source, source)
        source_of[f"model.{name}" if name.startswith("decoder.") else name] = source
    config.extra.setdefault("architectures", [cls.__name__])
    chosen = dtype or _stored_dtype(weights, sources)
    task = _Task(weights, config, source_of, chosen, {})
    task.files.update(split({name: task.size(name) for name in source_of}, limit))
    return task


def _stored_dtype(weights: Weights, sources: list[str]) -> torch.dtype:
    """Return the one dtype of the source's tensors."""
    found: dict[torch.dtype | None, str] = {}
    for name in sources:
        found.setdefault(weights.specs[name].dtype, name)
    if len(found) > 1:
        said = "; ".join(f"{weights.stored_name(n)} is {kind}" for kind, n in found.items())
        raise CheckpointError(
            f"{weights.layout.folder} mixes dtypes ({said}). Say with dtype= in which one the new "
            "checkpoint should be; float32 holds them all but float64."
        )
    return next(iter(found))


# ------------------------------------------------------------------------------ writing it


def _write_shards(task: _Task, target: Path, manifest: Manifest, progress: bool) -> None:
    """Write the files that are not finished, then compare all of them with their checksums."""
    todo = [file for file in task.files if file not in manifest.done]
    check_room(target, task.bytes_of(todo))
    total = task.bytes_of(list(task.files))
    there = total - task.bytes_of(todo)
    look = {"desc": "Converting", "initial": there, "unit": "B", "unit_scale": True, "leave": False}
    with progress_bar(total, progress, **look) as bar:
        for file in todo:
            digest = hashlib.sha256()
            specs = {name: (task.shape(name), task.dtype) for name in task.files[file]}
            tensors = _Tensors(task, bar)
            with replacing(target / file) as temporary:
                write_safetensors(temporary, specs, tensors.take, digest)
            manifest.note(file, digest.hexdigest())
    with progress_bar(len(todo), progress, desc="Reading back", leave=False) as bar:
        for file in todo:
            if sha256_of(target / file) != manifest.done[file]:
                manifest.forget(file)
                raise CheckpointError(
                    f"{target / file} reads back differently from what was written: the disk or "
                    "its connection is failing. That file was removed; check the disk, then run "
                    "the same again."
                )
            bar.update()


class _Tensors:
    """Gives the source's tensors in the new dtype, letting go of its pages now and then."""

    def __init__(self, task: _Task, bar: tqdm) -> None:
        self.task, self.bar, self.read = task, bar, 0

    def take(self, name: str) -> Tensor:
        """Return a tensor in the new dtype."""
        weights = self.task.weights
        if self.read > _RELEASE_BYTES:
            weights.release()
            self.read = 0
        tensor = weights.tensor(self.task.source_of[name])
        cast = tensor.to(self.task.dtype)
        self.read += tensor.nbytes
        self.bar.update(cast.nbytes)
        if torch.finfo(cast.dtype).max < torch.finfo(tensor.dtype).max:
            if int(cast.isinf().sum()) != int(tensor.isinf().sum()):
                where = weights.where(self.task.source_of[name])
                raise CheckpointError(
                    f"{where} holds values up to {float(tensor.abs().max()):.5g}, which do not fit "
                    f"in {cast.dtype} (at most {torch.finfo(cast.dtype).max:.5g}). Convert to "
                    'dtype="bfloat16" or "float32".'
                )
        return cast


def _check_source(folder: Path, manifest: Manifest) -> None:
    changed = manifest.difference(source_files(folder))
    if changed is not None:
        raise CheckpointError(
            f"{changed} in {folder} changed while it was being converted. Wait until it is "
            "complete, then run again with restart=True (--restart)."
        )


def _not_written(task: _Task, target: Path, error: OSError) -> str:
    """Say why a conversion stopped, what there is of it and how to go on."""
    done = [file for file in task.files if (target / file).exists()]
    left = task.bytes_of([file for file in task.files if file not in done])
    kept = "Nothing was finished"
    if done:
        kept = f"{len(done)} of {len(task.files)} files are finished and kept ({listing(done, 2)})"
    return (
        f"The conversion to {target} stopped: {str(error.strerror or error).rstrip('.')}. {kept}. "
        f"{advice_on(error, left)}Run the same again to go on."
    )


@contextmanager
def _folder_alone(target: Path) -> Iterator[None]:
    """Make a folder, and take it away if it stays empty."""
    made = [folder for folder in (target, *target.parents) if not folder.exists()]
    try:
        target.mkdir(parents=True, exist_ok=True)
        with _locked(target):
            yield
    except BaseException:
        for folder in made:  # the deepest comes first
            with suppress(OSError):  # not made after all, or something is in it
                folder.rmdir()
        raise


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Refuse a second conversion to the same folder, where the system can tell."""
    try:
        import fcntl
    except ImportError:  # not a Unix
        yield
        return
    handle = os.open(target, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"Another conversion is writing to {target}. Wait for it, or name another folder."
            ) from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)
