"""Writing files so that nothing is lost: to a temporary name, then renamed.

Also the one format in which caches and recordings are kept: safetensors, with facts as JSON in the
file's metadata.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FACTS = "optlens"  # the metadata key


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path beside `path`; on leaving, put what was written there in its place.

    If the block raises (a full disk, an interrupt), the temporary file is removed and an existing
    file at `path` is as it was.

    Raises:
        OSError: If the folder is missing or cannot be written, naming it.

    Example:
        >>> with replacing("notes.txt") as temporary:  # doctest: +SKIP
        ...     temporary.write_text("all of it or nothing")
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"Cannot write {path}: it is a folder; name a file in it.")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"Cannot write {path}: there is no folder {path.parent}; create it first."
        )
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise type(error)(
            error.errno, f"Cannot write {path}: {error.strerror or error}. Nothing was changed."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], facts: dict[str, Any]
) -> None:
    """Write tensors and JSON-able facts to one safetensors file, atomically.

    Raises:
        OSError: If the file cannot be written; an existing one is then untouched.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # safetensors takes no two names for one piece of memory, and no strides
    own = {n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(own, temporary, metadata={FACTS: json.dumps(facts)})
        except SafetensorError as error:
            raise OSError(None, str(error)) from error


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
