"""The manifest of a conversion: what it is made from, and which files are finished.

It lies beside the new files as `conversion.json`, and stays there, for its checksums.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from optlens.checkpoints.errors import CheckpointError, listing
from optlens.checkpoints.layout import (
    CONFIG,
    CONVERSION,
    SAFETENSORS,
    SAFETENSORS_INDEX,
    TORCH_INDEX,
    WEIGHT_FILES,
    find_layout,
    read_json,
)
from optlens.checkpoints.shards import SHARD, as_json
from optlens.files import replacing

_KIND = "optlens conversion"
_BLOCK = 2**22


class Manifest:
    """What is known of a conversion, kept on the disk after every change.

    Attributes:
        path: The file.
        done: Finished weight file -> SHA-256 of what it holds.
        complete: Whether index, config and tokenizer are written, too.
    """

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        """Hold the facts of a conversion, which `begin` finds or makes."""
        self.path, self._facts = path, facts
        self.done: dict[str, str] = facts["done"]

    @classmethod
    def begin(
        cls,
        target: Path,
        source: dict[str, list[int]],
        dtype: str,
        limit: int,
        files: dict[str, list[str]],
        restart: bool,
    ) -> Manifest:
        """Take up the conversion that was begun in a folder, or begin one.

        Args:
            target: The folder.
            source: The source's files, as `source_files` gives them.
            dtype: Of the new weights.
            limit: Bytes of a file.
            files: New file -> the tensors in it.
            restart: Remove what a conversion of something else has left.

        Raises:
            CheckpointError: If the folder holds another checkpoint or another conversion.
        """
        about = {"source": source, "dtype": dtype, "shard_size": limit, "files": files}
        path = target / CONVERSION
        if path.exists():
            found = read_json(path)
            manifest = cls(path, _checked(path, found))
            reason = manifest._unlike(about)
            if reason is None:
                manifest._remove_leftovers()
                manifest._verify()
                needed = [CONFIG, SAFETENSORS_INDEX] if len(files) > 1 else [CONFIG]
                manifest._facts["complete"] &= all((target / name).exists() for name in needed)
                return manifest
            if not restart:
                raise CheckpointError(
                    f"{target} holds a conversion of something else: {reason}. Give what it was "
                    "begun with to go on, name another folder, or begin anew with restart=True "
                    "(--restart), which removes the files of the earlier one."
                )
            manifest._remove_all()
        else:
            _refuse_other_checkpoints(target)
        manifest = cls(path, {"kind": _KIND, **about, "complete": False, "done": {}})
        manifest._save()
        return manifest

    @property
    def complete(self) -> bool:
        """Whether everything was written."""
        return self._facts["complete"]

    @contextmanager
    def dropped_if_in_vain(self) -> Iterator[None]:
        """Remove the manifest if a block raises before any file is in place."""
        try:
            yield
        except BaseException:
            # A file can stand before it is noted; without a manifest it would be a stranger's.
            if not any((self.path.parent / file).exists() for file in self._facts["files"]):
                with suppress(OSError):
                    self.path.unlink()
            raise

    def note(self, file: str, digest: str) -> None:
        """Keep that a file is finished."""
        self.done[file] = digest
        self._save()

    def forget(self, file: str) -> None:
        """Remove a file that is not what it should be."""
        self._facts["complete"] = False
        del self.done[file]
        self._save()
        (self.path.parent / file).unlink(missing_ok=True)

    def finish(self) -> None:
        """Keep that everything is written."""
        self._facts["complete"] = True
        self._save()

    def difference(self, source: dict[str, list[int]]) -> str | None:
        """Return the first file in which a source differs from the one converted."""
        was = self._facts["source"]
        return next((n for n in sorted({*was, *source}) if was.get(n) != source.get(n)), None)

    def _unlike(self, about: dict[str, Any]) -> str | None:
        """Say in what a conversion differs from the one that was begun."""
        changed = self.difference(about["source"])
        if changed is not None:
            missing = changed not in about["source"] or changed not in self._facts["source"]
            return f"its source {'had other files' if missing else 'has changed since'} ({changed})"
        for key in ("dtype", "shard_size"):
            if self._facts[key] != about[key]:
                return f"it was begun with {key} {self._facts[key]}, not {about[key]}"
        if self._facts["files"] != about["files"]:
            return "another version of optlens divided the tensors in another way"
        return None

    def _verify(self) -> None:
        """Forget finished files that are gone or damaged."""
        for file, digest in list(self.done.items()):
            path = self.path.parent / file
            if not path.is_file() or sha256_of(path) != digest:
                state = "damaged" if path.exists() else "gone"
                warnings.warn(
                    f"{path} was finished, but is {state}; writing it again.", stacklevel=4
                )
                self.forget(file)

    def _remove_leftovers(self) -> None:
        """Remove temporary files of a process that was killed; nobody else writes here now."""
        for path in self.path.parent.glob(".optlens-*.tmp"):
            with suppress(OSError):
                path.unlink()

    def _remove_all(self) -> None:
        self._remove_leftovers()
        for name in (SAFETENSORS_INDEX, CONFIG, *self._facts["files"]):
            (self.path.parent / name).unlink(missing_ok=True)

    def _save(self) -> None:
        with replacing(self.path) as temporary:
            temporary.write_text(as_json(self._facts), encoding="utf-8")


def _checked(path: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest's facts if they are one's."""
    kinds = {"source": dict, "dtype": str, "shard_size": int, "files": dict, "done": dict}
    kinds["complete"] = bool
    right = all(isinstance(found.get(key), kind) for key, kind in kinds.items())
    names = [*found["files"], *found["done"]] if right else []
    # Its names are removed on a restart: they must not lead elsewhere.
    safe = all(SHARD.fullmatch(name) or name == SAFETENSORS for name in names)
    if found.get("kind") != _KIND or not right or not safe:
        raise CheckpointError(
            f"{path} is not the manifest of a conversion, or is damaged. Name another folder, or "
            "remove it if nothing in its folder is needed."
        )
    return found


def _refuse_other_checkpoints(target: Path) -> None:
    names = [entry.name for entry in target.iterdir()]
    taken = sorted(n for n in names if n == CONFIG or n in WEIGHT_FILES or SHARD.fullmatch(n))
    if taken:
        raise CheckpointError(
            f"{target} holds another checkpoint ({listing(taken)}), which is left alone. Name an "
            "empty folder."
        )


def source_files(folder: Path) -> dict[str, list[int]]:
    """Return the size and time of change of the files that a checkpoint's tensors come from."""
    layout = find_layout(folder)
    names = [path.name for path in layout.files]
    names += [name for name in (CONFIG, SAFETENSORS_INDEX, TORCH_INDEX) if (folder / name).exists()]
    stats = {name: os.stat(folder / name) for name in names}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, read from the disk rather than from the system's cache."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
