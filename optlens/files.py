"""Writing files so that nothing is lost: to a temporary name, then renamed.

Also the one format in which caches and recordings are kept: safetensors, with facts as JSON in the
file's metadata.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FACTS = "optlens"  # the metadata key


def check_target(path: str | os.PathLike) -> None:
    """Refuse, before anything is computed, a file that could not be written in the end.

    Raises:
        OSError: If it is a folder, or its own folder is missing.
    """
    if os.path.isdir(path):
        raise IsADirectoryError(f"Cannot write {path}: it is a folder; name a file in it.")
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise FileNotFoundError(
            f"Cannot write {path}: there is no folder {folder}; create it first."
        )


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path beside `path`; on leaving, put what was written there in its place.

    If the block raises (a full disk, an interrupt), the temporary file is removed and an existing
    file at `path` is as it was. A replaced file's permissions are kept, and a symbolic link stays
    one: the file it leads to is replaced. What is no regular file (`/dev/null`, a named pipe) gets
    what was written copied into it.

    Raises:
        OSError: If the folder is missing or cannot be written, naming it.

    Example:
        >>> with replacing("notes.txt") as temporary:  # doctest: +SKIP
        ...     temporary.write_text("all of it or nothing")
    """
    path = Path(path)
    check_target(path)
    if os.path.exists(path) and not os.path.isfile(path):
        with tempfile.TemporaryDirectory() as folder, _naming(path):
            temporary = Path(folder, "file")
            yield temporary
            # Opened by hand, since open(path, "wb") would make a file, were the device gone by now.
            with open(temporary, "rb") as source, open(os.open(path, os.O_WRONLY), "wb") as special:
                shutil.copyfileobj(source, special)
        return
    target = Path(os.path.realpath(path))
    # A name of its own, as a long one with something added would be too long.
    temporary = target.with_name(f".optlens-{secrets.token_hex(4)}.tmp")
    try:
        with _naming(path, " Nothing was changed."):
            mode = _mode_for(target, temporary)
            yield temporary
            with suppress(OSError):  # a file system without permissions
                os.chmod(temporary, mode)
            os.replace(temporary, target)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def _naming(path: Path, outcome: str = "") -> Iterator[None]:
    """Let an error of the system say which file could not be written."""
    try:
        yield
    except OSError as error:
        reason = str(error.strerror or error).rstrip(".")
        raise type(error)(error.errno, f"Cannot write {path}: {reason}.{outcome}") from error


def _mode_for(target: Path, temporary: Path) -> int:
    """Return the permissions of the file at `target`, or those that a new file gets there."""
    if os.path.exists(target):
        return stat.S_IMODE(os.stat(target).st_mode)
    # Asking for the umask would change it for a moment, for all threads; a new file shows it.
    temporary.touch(exist_ok=False)
    mode = stat.S_IMODE(temporary.stat().st_mode)
    temporary.unlink()
    return mode


def why_unreadable(path: str | os.PathLike, error: OSError) -> str:
    """Say in a phrase why a file could not be opened; a dangling link looks like a missing file."""
    if os.path.islink(path) and not os.path.exists(path):
        return f"it is a link to {os.readlink(path)}, which does not exist"
    if os.path.isdir(path):
        return "it is a folder"
    return error.strerror or str(error)


def type_of(value: object) -> str:
    """Return the name of a value's type with its article, for a message.

    Example:
        >>> type_of(3), type_of([])
        ('an int', 'a list')
    """
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def write_tensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], facts: dict[str, Any]
) -> None:
    """Write tensors and JSON-able facts to one safetensors file, atomically.

    Raises:
        OSError: If the file cannot be written; an existing one is then untouched.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    own = _each_its_memory(tensors)
    with replacing(path) as temporary:
        try:
            save_file(own, temporary, metadata={FACTS: json.dumps(facts)})
        except SafetensorError as error:
            raise OSError(None, str(error)) from error


def _each_its_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy what safetensors would not take: strides, and a second name for one piece of memory."""
    own: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        memory = tensor.untyped_storage().data_ptr()
        if memory in seen or not tensor.is_contiguous():
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(memory)
        own[name] = tensor
    return own


def read_tensors(path: str | os.PathLike, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` has written, checking that its facts say `kind`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or no file of this kind.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get(FACTS, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}.") from error
    if facts.get("kind") != kind:
        raise ValueError(
            f"{path} holds {facts.get('kind', 'no optlens data')}, not a {kind}; "
            "was it written by another call?"
        )
    return tensors, facts


def write_fields(path: str | os.PathLike, result: Any, kind: str) -> None:
    """Write a dataclass of tensors and JSON-able values to one safetensors file, atomically.

    Raises:
        OSError: If the file cannot be written; an existing one is then untouched.
    """
    parts = {part.name: getattr(result, part.name) for part in fields(result)}
    tensors = {name: value for name, value in parts.items() if isinstance(value, Tensor)}
    facts = {name: value for name, value in parts.items() if name not in tensors}
    write_tensors(path, tensors, {"kind": kind, "fields": facts})


def read_fields(path: str | os.PathLike, kind: str) -> dict[str, Any]:
    """Read what `write_fields` has written, as arguments by name; tuples have become lists.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or no file of this kind.
    """
    tensors, facts = read_tensors(path, kind)
    return {**tensors, **facts["fields"]}
