"""Which files make a checkpoint folder, and under which names they keep OPT's tensors.

A folder in Hugging Face format holds `config.json` and the weights in one of four layouts: one
safetensors file, several with an index, one pickled `.bin`, several with an index. Inside, the
published OPTs spell the same tensor in two ways:

    model.decoder.layers.0.fc1.weight    125m, 1.3b, 2.7b, 66b; also carry lm_head.weight
    decoder.layers.0.fc1.weight          350m, 6.7b, 13b, 30b; the lm_head is embed_tokens

Here the second spelling is the canonical one. The files that Meta's training code wrote,
`reshard-model_part-0.pt` and on, are a fifth layout, read by `metaseq`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from optlens.checkpoints.errors import CheckpointError, listing
from optlens.files import type_of, why_unreadable

Format = Literal["safetensors", "torch", "metaseq"]

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
CONVERSION = "conversion.json"  # what `convert` has done, and the checksums of what it wrote
SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
TORCH = "pytorch_model.bin"
TORCH_INDEX = "pytorch_model.bin.index.json"

# In order of preference, which is also transformers': safetensors cannot run code and is mapped
# into memory; a single file wins over shards, as a later save of a smaller model leaves it.
WEIGHT_FILES: dict[str, Format] = {
    SAFETENSORS: "safetensors",
    SAFETENSORS_INDEX: "safetensors",
    TORCH: "torch",
    TORCH_INDEX: "torch",
}
# Names transformers reads a tokenizer from; all of them are small.
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
# How the vocabulary and the merges are called beside Meta's original files.
METASEQ_TOKENIZER = ("gpt2-vocab.json", "gpt2-merges.txt")
READABLE = (
    "optlens reads OPT checkpoints in Hugging Face format, config.json with "
    f"{', '.join(list(WEIGHT_FILES)[:-1])} or {TORCH_INDEX}, and Meta's original "
    "reshard-model_part-*.pt"
)
# One file for each rank of tensor parallelism, or one file of all.
_METASEQ_PART = re.compile(r"(.+)-model_part-(\d+)\.pt")
_METASEQ_WHOLE = ("reshard.pt", "restored.pt")
_FSDP_SHARD = re.compile(r".+-shard\d+\.pt")
# Version number of fairseq's decoder, kept in some published files; no weight.
_NOT_WEIGHTS = frozenset({"decoder.version"})


@dataclass(frozen=True)
class Layout:
    """Where a folder keeps its weights.

    Attributes:
        folder: The checkpoint folder.
        format: "safetensors", "torch" (pickled `.bin`) or "metaseq" (Meta's original files).
        files: The weight files, in the order of the index, or of the parts.
        weight_map: For shards, the stored tensor name -> file name of the index; else None.
    """

    folder: Path
    format: Format
    files: tuple[Path, ...]
    weight_map: dict[str, str] | None = None


def canonical(key: str) -> str | None:
    """Return a stored tensor name in its canonical spelling, None for what is not a weight.

    Example:
        >>> canonical("model.decoder.embed_tokens.weight")
        'decoder.embed_tokens.weight'
        >>> canonical("lm_head.weight")
        'lm_head.weight'
        >>> canonical("decoder.version") is None
        True
    """
    if key.startswith("model.decoder."):
        key = key.removeprefix("model.")
    return None if key in _NOT_WEIGHTS else key


def choose_weights(names: Collection[str]) -> str | None:
    """Return the file of `names` to read the weights from, None when there is none.

    Args:
        names: File names of a folder or of a Hub repository.

    Example:
        >>> choose_weights({"pytorch_model.bin", "model.safetensors", "config.json"})
        'model.safetensors'
    """
    return next((name for name in WEIGHT_FILES if name in names), None)


def find_layout(folder: Path) -> Layout:
    """Find the weights of a checkpoint folder.

    Args:
        folder: A local folder.

    Returns:
        The layout; all files that it names exist.

    Raises:
        CheckpointError: If there are no weights, or a shard that the index names is missing.
    """
    names = {entry.name for entry in folder.iterdir()}
    chosen = choose_weights(names)
    if chosen is None:
        parts = metaseq_files(folder)
        if not parts:
            raise CheckpointError(_no_weights(folder, names))
        return Layout(folder, "metaseq", parts)
    kind = WEIGHT_FILES[chosen]
    if chosen in (SAFETENSORS, TORCH):
        return Layout(folder, kind, (folder / chosen,))
    weight_map = read_weight_map(folder / chosen)
    shards = list(dict.fromkeys(weight_map.values()))
    missing = [shard for shard in shards if shard not in names]
    if missing:
        raise CheckpointError(
            f"{folder} is incomplete: {chosen} names {len(shards)} weight files, of which "
            f"{len(missing)} are missing ({listing(missing)}).{_unfinished(folder)} Download the "
            "missing files again; a finished download resumes where it stopped."
        )
    return Layout(folder, kind, tuple(folder / shard for shard in shards), weight_map)


def metaseq_files(folder: Path) -> tuple[Path, ...]:
    """Return Meta's original files of a folder, the parts in order; none where there are none.

    Raises:
        CheckpointError: If a part before the last is missing, or there are parts of two models.
    """
    names = sorted(entry.name for entry in folder.iterdir())
    parts = {name: found for name in names if (found := _METASEQ_PART.fullmatch(name))}
    if not parts:
        whole = next((name for name in _METASEQ_WHOLE if name in names), None)
        return () if whole is None else (folder / whole,)
    stems = sorted({found[1] for found in parts.values()})
    if len(stems) > 1:
        raise CheckpointError(
            f"{folder} holds parts of {len(stems)} checkpoints ({listing(stems)}); optlens cannot "
            "know which is meant. Move the others to folders of their own."
        )
    by_number = {int(found[2]): name for name, found in parts.items()}
    missing = [n for n in range(max(by_number)) if n not in by_number]
    if missing:
        raise CheckpointError(missing_parts(folder, stems[0], missing, max(by_number) + 1))
    return tuple(folder / by_number[number] for number in sorted(by_number))


def missing_parts(folder: Path, stem: str, missing: list[int], total: int | str) -> str:
    """Say which parts of a tensor-parallel set are not there."""
    gone = listing([f"{stem}-model_part-{number}.pt" for number in missing], limit=16)
    return (
        f"{folder} is incomplete: every tensor is split over {total} parts, of which "
        f"{len(missing)} are missing ({gone}).{_unfinished(folder)} Download the missing parts "
        "into the same folder."
    )


def read_weight_map(index: Path) -> dict[str, str]:
    """Return the tensor name -> file name table of an index file.

    Raises:
        CheckpointError: If the file is no such index, or names files outside its folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index} is not an index of weight files: it has no 'weight_map'. Download it again."
        )
    for key, name in weight_map.items():
        # An index from an unknown source must not make us open arbitrary files.
        if not isinstance(name, str) or not name or Path(name).name != name or "\\" in name:
            raise CheckpointError(
                f"{index} puts {key!r} into {name!r}, which is not the name of a file in the same "
                "folder. Get the checkpoint from a source that you trust."
            )
    return weight_map


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`.

    Raises:
        CheckpointError: If the file cannot be read, holds no JSON object, or gives a key twice
            with different values, as an index does in which two shards claim one tensor.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in pairs:
            if values.setdefault(key, value) != value:
                raise CheckpointError(
                    f"{path} gives {key!r} twice, as {values[key]!r} and as {value!r}; optlens "
                    "cannot know which is right. Remove one of them, or download the file again."
                )
        return values

    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {why_unreadable(path, error)}.") from error
    except ValueError as error:
        reason = what_else(path) or f"it is not valid JSON ({error})"
        raise CheckpointError(f"{path} cannot be read: {reason}. Download it again.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type_of(values)}.")
    return values


def what_else(path: Path) -> str | None:
    """Say what a file that could not be parsed is instead, None when nothing is recognised."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        return why_unreadable(path, error)
    if not start:
        return "the file is empty, as an interrupted download leaves it"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, not the file itself"
    return None


def _no_weights(folder: Path, names: set[str]) -> str:
    """Explain why none of the files in `folder` can be read as weights."""
    shards = sorted(n for n in names if n.endswith((".safetensors", ".bin")) and "-of-" in n)
    if shards:
        return (
            f"{folder} holds weight files ({listing(shards)}) without their index "
            f"({SAFETENSORS_INDEX} or {TORCH_INDEX}). Download the index as well."
        )
    flat = sorted(name for name in names if _FSDP_SHARD.fullmatch(name))
    if flat:
        return (
            f"{folder} holds flattened shards of metaseq's training ({listing(flat)}). Merge them "
            "with metaseq's own scripts/reshard_fsdp.py (--unflatten-weights True) to "
            "reshard-model_part-*.pt files, which optlens reads."
        )
    if "adapter_config.json" in names:
        return (
            f"{folder} holds a PEFT adapter, not a whole model. Load the base model, merge the "
            "adapter into it with PEFT and save the result."
        )
    found = sorted(n for n in names if n != CONFIG and not n.startswith("."))
    return (
        f"{folder} holds no weights that optlens can read (found: {listing(found) or 'nothing'})."
        f"{_unfinished(folder)} {READABLE}."
    )


def _unfinished(folder: Path) -> str:
    """Name downloads that never finished, for a message; they explain a missing file."""
    downloads = folder / ".cache" / "huggingface" / "download"
    parts = [*folder.glob("*.incomplete"), *folder.glob("*.part"), *downloads.glob("*.incomplete")]
    if not parts:
        return ""
    return f" A download did not finish ({listing(sorted(p.name for p in parts))})."
