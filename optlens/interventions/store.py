"""Interventions as JSON and tensors: kept in a file, and described in a recording's provenance."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optlens.files import read_tensors, write_tensors
from optlens.interventions.address import decode, encode
from optlens.interventions.edits import Edit, active_edits, as_list
from optlens.interventions.held import HeldRun
from optlens.interventions.intervention import PROMPTS, Intervention
from optlens.interventions.kinds import KINDS
from optlens.selection import show

if TYPE_CHECKING:
    from optlens.base import OPTBase

KIND, FORMAT = "list of interventions", 1


def save_interventions(
    path: str | os.PathLike, interventions: Intervention | Iterable[Intervention]
) -> None:
    """Write interventions to one safetensors file, with their description as JSON in its header.

    An existing file is replaced only when all is written.

    Args:
        path: The file.
        interventions: One, or several.

    Raises:
        OSError: If the file cannot be written.

    Example:
        >>> save_interventions("cut.safetensors", [Knockout(query=-1, key=3)])  # doctest: +SKIP
        >>> load_interventions("cut.safetensors")  # doctest: +SKIP
        [Knockout(query=-1, key=3)]
    """
    tensors: dict[str, Tensor] = {}
    written = []
    for number, each in enumerate(as_list(interventions)):
        written.append(_write(each, f"{number}.", tensors))
    write_tensors(path, tensors, {"kind": KIND, "format": FORMAT, "interventions": written})


def load_interventions(path: str | os.PathLike) -> list[Intervention]:
    """Read what `save_interventions` has written; equal to it, and acting alike.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, holds something else, or was written by a later version.
    """
    tensors, facts = read_tensors(path, KIND)
    unknown = {each["kind"] for each in facts["interventions"]} - KINDS.keys()
    if facts["format"] > FORMAT or unknown:
        what = f"has {', '.join(sorted(unknown))}" if unknown else f"is of format {facts['format']}"
        raise ValueError(f"{path} {what}, which this version of optlens does not know; update it.")
    return [_read(each, tensors) for each in facts["interventions"]]


def describe(intervention: Intervention) -> dict[str, Any]:
    """Return an intervention as JSON, with shape, dtype and a hash in place of each tensor."""
    tensors: dict[str, Tensor] = {}
    written = _write(intervention, "", tensors)
    return {**written, "tensors": {name: _digest(value) for name, value in tensors.items()}}


def in_words(described: Mapping[str, Any]) -> str:
    """Write what `describe` or `provenance` gave as a user would write the call.

    Example:
        >>> in_words({"kind": "Scale", "site": "z", "layer": [0, 1], "factor": 0.5, "tensors": {}})
        "Scale('z', layer=[0, 1], factor=0.5)"
    """
    kind, tensors, parts = KINDS.get(described["kind"]), described["tensors"], []
    for field in dataclasses.fields(kind) if kind is not None else ():
        given, prefix = described.get(field.name), f"{field.name}="
        if isinstance(given, dict) and "run" in given:
            text = repr(HeldRun(dict.fromkeys(given["hooks"])))
        elif field.name in PROMPTS and given is not None:
            count = len(given) if isinstance(given, list) else tensors[given["tensor"]]["shape"][0]
            text = f"<{count} prompt{'s' * (count > 1)}>"
        elif isinstance(given, dict) and "tensor" in given:
            tensor = tensors[given["tensor"]]
            text = f"tensor{tensor['shape']} {tensor['dtype'].removeprefix('torch.')}"
        else:
            given = decode(given)
            if given == field.default:
                continue
            text = show(tuple(given) if isinstance(given, list) else given)
            prefix = "" if field.name == "site" and kind is not KINDS["Steer"] else prefix
        parts.append(prefix + text)
    return f"{described['kind']}({', '.join(parts)})"


def provenance(model: OPTBase) -> list[dict[str, Any]]:
    """Describe the interventions that act on a model now, in the order in which they were given."""
    return describe_edits(active_edits(model))


def describe_edits(edits: Iterable[Edit]) -> list[dict[str, Any]]:
    """Describe interventions that have met a model.

    With the positions of the spans that they use, whose names mean nothing elsewhere.
    """
    described = []
    for edit in edits:
        spans = {name: _plain(entry) for name, entry in edit.spans.items()}
        described.append(describe(edit.intervention) | ({"spans": spans} if spans else {}))
    return described


def _plain(entry: Any) -> Any:
    """Return a span's entry as numbers and lists of them."""
    if hasattr(entry, "tolist"):
        return entry.tolist()
    return entry if isinstance(entry, int) else [_plain(each) for each in entry]


def _write(intervention: Intervention, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return an intervention as JSON, and put its tensors aside under names with a prefix."""
    written: dict[str, Any] = {"kind": type(intervention).__name__}
    for field in dataclasses.fields(intervention):
        given, name = getattr(intervention, field.name), prefix + field.name
        if isinstance(given, Tensor):
            tensors[name] = given
            written[field.name] = {"tensor": name}
        elif isinstance(given, HeldRun):
            tensors |= {f"{name}.{hook}": value for hook, value in given.values.items()}
            if given.real is not None:
                tensors[f"{name}.real"] = given.real
            written[field.name] = {"run": name, "hooks": list(given.values)}
        else:
            written[field.name] = encode(given)
    return written


def _read(written: dict[str, Any], tensors: dict[str, Tensor]) -> Intervention:
    fields = {}
    for name, given in written.items():
        if isinstance(given, dict) and "tensor" in given:
            fields[name] = tensors[given["tensor"]]
        elif isinstance(given, dict) and "run" in given:
            run = given["run"]
            values = {hook: tensors[f"{run}.{hook}"] for hook in given["hooks"]}
            fields[name] = HeldRun(values, tensors.get(f"{run}.real"))
        else:
            fields[name] = decode(given)
    return KINDS[fields.pop("kind")](**fields)


def _digest(tensor: Tensor) -> dict[str, Any]:
    flat = tensor.detach().cpu().flatten()
    flat = flat.float() if flat.dtype == torch.bfloat16 else flat  # NumPy has no bfloat16
    data = flat.contiguous().numpy().tobytes()
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype),
        "sha256": hashlib.sha256(data).hexdigest()[:16],
    }
