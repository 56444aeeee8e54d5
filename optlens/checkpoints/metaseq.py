"""Meta's original checkpoints, as its training code metaseq wrote them.

A checkpoint is one file for each rank of tensor parallelism, `reshard-model_part-0.pt` and on (one
file up to 6.7b, eight for 66b and 175b), or `reshard.pt` (350m). Each is a pickled table whose
entry "model" has the rank's tensors and whose "cfg" or "args" says how the model was trained.
Against the Hugging Face format:

* queries, keys and values are one tensor `qkv_proj`, whose rows are, despite the name, **keys,
  values, queries**; every rank has its share of each of the three;
* `embed_tokens`, `fc1` and the rows of keys, values and queries are split between the ranks along
  the first axis, the weights of `fc2` and `out_proj` along the second; all else is on every rank;
* the final LayerNorm is `decoder.layer_norm`, and 350m's projections are `project_in_dim` and
  `project_out_dim`.

Parts are mapped into memory and put together tensor by tensor.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from optlens.checkpoints.errors import CheckpointError, listing
from optlens.checkpoints.layout import canonical, missing_parts
from optlens.checkpoints.matching import HEAD
from optlens.checkpoints.read import TensorSpec, TorchFile, compare

POSITIONS = "decoder.embed_positions.weight"
_RENAMED = {
    "decoder.layer_norm.weight": "decoder.final_layer_norm.weight",
    "decoder.layer_norm.bias": "decoder.final_layer_norm.bias",
    "decoder.project_in_dim.weight": "decoder.project_in.weight",
    "decoder.project_out_dim.weight": "decoder.project_out.weight",
    "decoder.output_projection.weight": HEAD,
}
_FUSED = ("k_proj", "v_proj", "q_proj")  # the order of the rows
# The last words of a tensor's name -> the axis along which the ranks share it.
_SPLIT = {
    "embed_tokens.weight": 0,
    "output_projection.weight": 0,
    "fc1.weight": 0,
    "fc1.bias": 0,
    "fc2.weight": 1,
    "out_proj.weight": 1,
} | {f"{part}_proj.{kind}": 0 for part in ("qkv", "q", "k", "v") for kind in ("weight", "bias")}
# Packages whose objects the training settings are made of, and types that they mention.
_SETTINGS = ("argparse", "omegaconf", "metaseq", "fairseq", "typing", "pathlib", "enum")
_TYPES = ("dict", "list", "tuple", "int", "float", "str", "bool", "defaultdict")
_TYPE_MODULES = ("builtins", "__builtin__", "collections")
_COMPARED_ROWS = 8  # of the embedding, to tell parts from each other


class _Inert(dict):
    """Stands for an object of the training settings: keeps what was stored, and does nothing."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


class _Piece(NamedTuple):
    """Where a tensor comes from: its name in the parts, which third of it, and the split axis."""

    source: str
    third: int | None
    axis: int | None


class MetaseqPart(TorchFile):
    """One rank's file.

    Attributes:
        settings: How the model was trained, as nested tables; empty if the file does not say.
    """

    settings: dict[str, Any]

    def _load(self) -> dict[str, Tensor]:
        with safe_globals(self._stand_ins()):
            values = super()._load()
        kept = [plain(values.get(key)) for key in ("cfg", "args")]
        self.settings = next((table for table in kept if table and isinstance(table, dict)), {})
        model = values.get("model", values)
        if not isinstance(model, dict) or not model:
            raise CheckpointError(
                f'{self.path} holds no table of tensors under "model" (found: '
                f"{listing([str(key) for key in values])}). A metaseq checkpoint is what its "
                "training wrote as reshard-model_part-*.pt."
            )
        return model

    def _stand_ins(self) -> list[tuple[type, str]]:
        """Return what to read instead of the classes that settings are pickled as.

        Loading with weights only refuses classes; those of the settings' packages are replaced by
        one that has no behaviour, so that no package is needed and no code of the file is run.
        """
        try:
            named = get_unsafe_globals_in_checkpoint(self.path) if self.mapped else []
        except Exception:  # a damaged file, of which reading it says what is wrong
            named = []
        return [(type("_Inert", (_Inert,), {}), name) for name in named if _is_of_settings(name)]


def _is_of_settings(name: str) -> bool:
    module, _, kind = name.rpartition(".")
    is_type = module in _TYPE_MODULES and kind in _TYPES
    return is_type or module.partition(".")[0] in _SETTINGS


def plain(value: Any) -> Any:
    """Turn settings into tables, lists and plain values, whatever they were pickled as.

    An omegaconf table keeps its entries under `_content` and a value under `_val`; a namespace has
    them as attributes.
    """
    if isinstance(value, _Inert):
        kept = value.__dict__
        for inner in ("_content", "_val"):
            if inner in kept:
                return plain(kept[inner])
        value = {**value, **kept}
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value


class MetaseqFile:
    """All parts of a checkpoint as one file, under canonical names.

    Attributes:
        parts: The open files, one for each rank.
        mapped: Whether all of them are mapped into memory.
        settings: How the model was trained, from the first part.
    """

    def __init__(self, paths: Sequence[Path], verify: bool) -> None:
        """Open the parts of a checkpoint.

        Args:
            paths: The files, in the order of the ranks.
            verify: Compare every part with its checksums first.

        Raises:
            CheckpointError: If a file is damaged, a part is missing, or parts do not belong
                together.
        """
        self.paths = list(paths)
        self.parts = [MetaseqPart(path, verify) for path in self.paths]
        for part in self.parts:
            compare(part.take_checksums())
        self.mapped = all(part.mapped for part in self.parts)
        self.settings = self.parts[0].settings
        self._check_parts()
        self._pieces: dict[str, _Piece] = {}
        for source in self.parts[0].names():
            self._add(source)

    def _add(self, source: str) -> None:
        """Note which tensors an entry of the parts gives."""
        stored = canonical(source)
        if stored is None:
            return
        ending = ".".join(stored.split(".")[-2:])
        axis = _SPLIT.get(ending)
        if ".qkv_proj." in stored:
            rows = self.parts[0].spec(source).shape[0]
            if rows % 3:
                raise CheckpointError(
                    f"{self.paths[0]}: {source!r} has {rows} rows, which are not keys, values and "
                    "queries of one size. The file is damaged, or of a model with grouped heads."
                )
            pieces = {
                stored.replace("qkv_proj", part): _Piece(source, third, axis)
                for third, part in enumerate(_FUSED)
            }
        else:
            pieces = {_RENAMED.get(stored, stored): _Piece(source, None, axis)}
        for name, piece in pieces.items():
            if name in self._pieces:
                raise CheckpointError(
                    f"{self.paths[0]}: {source!r} is the same tensor as "
                    f"{self._pieces[name].source!r}. Remove one of them."
                )
            self._pieces[name] = piece

    # ------------------------------------------------------------------ what it holds

    def names(self) -> list[str]:
        """Return the canonical tensor names."""
        return list(self._pieces)

    def spec(self, name: str) -> TensorSpec:
        """Return shape and dtype of a tensor that is put together."""
        source, third, axis = self._pieces[name]
        shape, dtype = self.parts[0].spec(source)
        whole = list(shape)
        if axis is not None:
            whole[axis] *= len(self.parts)
        if third is not None:
            whole[0] //= 3
        return TensorSpec(tuple(whole), dtype)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor; a view of the mapped file where there is only one."""
        source, third, axis = self._pieces[name]
        found = [part.tensor(source) for part in self.parts]
        if third is not None:
            found = [each.unflatten(0, (3, -1))[third] for each in found]
        if len(found) == 1:
            return found[0]
        if axis is None:
            self._compare(source, found)
            return found[0]
        return torch.cat(found, dim=axis)

    def _compare(self, source: str, copies: list[Tensor]) -> None:
        """Warn if ranks disagree about a tensor that each has whole."""
        first = copies[0]
        different = [n for n, copy in enumerate(copies) if not torch.equal(copy, first)]
        # NaN differs from itself, and is for the checks of a run to report.
        if different and not first.isnan().any():
            most = max(float((copies[n].double() - first.double()).abs().max()) for n in different)
            warnings.warn(
                f"{self.paths[0].parent}: {source!r} should be the same in every part, but differs "
                f"by up to {most:.2g} in {listing([self.paths[n].name for n in different])}; using "
                f"that of {self.paths[0].name}, as metaseq does.",
                stacklevel=2,
            )

    # ------------------------------------------------------------------ do they belong together

    def _check_parts(self) -> None:
        first, others = self.parts[0], self.parts[1:]
        for part in others:
            _check_same_tensors(first, part)
        expected = self._ranks()
        if expected is None or expected == len(self.parts):
            for earlier, part in combinations(self.parts, 2):
                _check_not_one_part_twice(earlier, part)
            return
        if expected < len(self.parts):
            raise CheckpointError(
                f"{first.path.parent} holds {len(self.parts)} parts, but the shapes in them belong "
                f"to a model split over {expected}. Parts of different checkpoints lie in one "
                "folder; move the others away."
            )
        stem = first.path.name.removesuffix(".pt").rpartition("-model_part-")[0]
        missing = list(range(len(self.parts), expected))
        raise CheckpointError(
            missing_parts(first.path.parent, stem or "reshard", missing, expected)
        )

    def _ranks(self) -> int | None:
        """Return over how many parts the tensors are split: keys have one row for each column."""
        part = self.parts[0]
        names = {name: part.spec(name).shape for name in part.names()}
        for name, shape in names.items():
            if name.endswith("self_attn.qkv_proj.weight") and shape[0]:
                return max(1, round(3 * shape[1] / shape[0]))
            if name.endswith("self_attn.k_proj.weight") and shape[0]:
                return max(1, round(shape[1] / shape[0]))
        return None


def _check_same_tensors(first: MetaseqPart, part: MetaseqPart) -> None:
    """Raise unless two parts hold the same tensors in the same shapes."""
    odd = sorted(set(first.names()) ^ set(part.names()))
    if odd:
        raise CheckpointError(
            f"{first.path} and {part.path.name} are no parts of one checkpoint: only one of them "
            f"has {listing(odd)}. Download both again."
        )
    for name in first.names():
        mine, other = first.spec(name), part.spec(name)
        if mine != other:
            raise CheckpointError(
                f"{part.path}: {name!r} is {other.dtype} {list(other.shape)}, but in "
                f"{first.path.name} it is {mine.dtype} {list(mine.shape)}. The parts belong to "
                "different checkpoints; download them again."
            )


def _check_not_one_part_twice(earlier: MetaseqPart, part: MetaseqPart) -> None:
    """Raise if two parts hold the same rows of the embedding, of which each has its own."""
    for name in part.names():
        if name.endswith("embed_tokens.weight"):
            first, second = (each.tensor(name)[:_COMPARED_ROWS] for each in (earlier, part))
            if torch.equal(first, second) and first.any():
                raise CheckpointError(
                    f"{part.path} holds the same part as {earlier.path.name}, under another name. "
                    "Download it again."
                )
