"""One patch of a sweep by itself, as an intervention.

A result says in its metadata what was swept, so that any of its patches can be made again with
`model.intervene`: what a patching sweep writes is `Freeze` at the source prompt's values, an ablation
is `Ablate`, a knockout `Knockout`. Several prompts are taken one at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optlens import checks
from optlens.interventions import Ablate, Freeze, Intervention, Knockout
from optlens.patching.ablation import MODES, other_prompts
from optlens.patching.grid import layers_written
from optlens.patching.result import PatchResult
from optlens.patching.sites import site_named

if TYPE_CHECKING:
    from optlens.model import OPTForCausalLM

_SQUARES = ("attn_scores", "pattern")


@dataclass(frozen=True)
class OnePatch:
    """One patch of one prompt.

    Attributes:
        intervention: What does the same in `model.intervene`.
        tokens: Ids of the prompt that is run, without padding.
        name: What the sweep calls it: "clean", "corrupt" or "prompt".
        source: Ids of the prompt whose values are written; None where there is none.
        source_name: "clean", "corrupt" or, if it is one of a reference set, "reference".
    """

    intervention: Intervention
    tokens: list[int]
    name: str
    source: list[int] | None = None
    source_name: str = ""


def one_patch(
    result: PatchResult, index: Sequence[int], prompt: int = 0, model: OPTForCausalLM | None = None
) -> OnePatch:
    """Return a patch of a sweep as an intervention.

    Args:
        result: What `patch_sweep`, `ablate_sweep` or `knockout_sweep` found.
        index: Which patch, an entry for each axis.
        prompt: Which of the prompts.
        model: The model, for its tokenizer: a mean over reference prompts of unequal length needs it.

    Raises:
        InputError: If the result comes from another kind of sweep.

    Example:
        >>> import optlens
        >>> model, metric = optlens.load(), optlens.metrics.logit_diff(" Paris", " Rome")
        >>> prompts = "The capital of France is", "The capital of Italy is"
        >>> found = optlens.patch_sweep(model, *prompts, "z", ("layer", "head"), metric, progress=False)
        >>> one_patch(found, (3, 1)).intervention
        Freeze('z', layer=3, source=<1 prompt>, head=1)
    """
    about, at = result.metadata, _entries(result, index)
    reason = why_not_one(result)
    if reason:
        raise checks.InputError(reason)
    if about.get("mode") == "knockout":
        return OnePatch(_knockout(about, at, prompt), _ids(about, "prompts", prompt), "prompt")
    where = _address(about, at | _numbers(about, at, prompt))
    if "direction" in about:
        names = ("clean", "corrupt") if about["direction"] == "denoise" else ("corrupt", "clean")
        source, tokens = (_ids(about, name, prompt) for name in names)
        freeze = Freeze(**where, source=torch.tensor([source]))
        return OnePatch(freeze, tokens, names[1], source, names[0])
    tokens = _ids(about, "prompts", prompt)
    if about["mode"] == "resample":
        rows = [torch.tensor(about[name]) for name in ("prompts", "reference")]
        drawn = int(other_prompts(*rows, about["seed"])[prompt])
        source = _ids(about, "reference", drawn)
        freeze = Freeze(**where, source=torch.tensor([source]))
        return OnePatch(freeze, tokens, "prompt", source, "reference")
    if about["mode"] == "zero":
        return OnePatch(Ablate(**where), tokens, "prompt")
    more = {"mode": "mean", "reference": _reference(about, model)}
    more["per_position"] = about["per_position"] or where["site"] in _SQUARES
    return OnePatch(Ablate(**where, **more), tokens, "prompt")


def why_not_one(result: PatchResult) -> str:
    """Say why the patches of a result are no single interventions; "" if they are."""
    about = result.metadata
    if "method" in about:
        return "Attribution patching estimates patches by gradients; it makes no run of its own."
    if "senders" in about:
        return "Path patching is more than one intervention; run optlens.path_patch for it."
    if "noise" in about:
        return "Causal tracing averages over draws of noise, so that it has no single patched run."
    if "direction" not in about and about.get("mode") not in (*MODES, "knockout"):
        return "This result does not say what was patched."
    if "layer" not in result.axes and "layers" not in about:
        return "This result does not say which layers were patched; run the sweep again."
    return ""


def _entries(result: PatchResult, index: Sequence[int]) -> dict[str, Any]:
    """Return for each axis what the patch's entry stands for."""
    shape = result.per_prompt.shape[:-1]
    if len(index) != len(shape) or not all(0 <= i < n for i, n in zip(index, shape, strict=False)):
        raise checks.InputError(f"index={tuple(index)}: the result has the shape {tuple(shape)}.")
    return {axis: result.choices[axis][i] for axis, i in zip(result.axes, index, strict=True)}


def _layers(about: Mapping[str, Any], at: Mapping[str, Any]) -> int | list[int]:
    if "layer" not in at:
        return about["layers"]
    blocks = about.get("blocks", at["layer"] + 1)
    span = layers_written(at["layer"], about.get("window", 1), [], blocks)
    return span[0] if len(span) == 1 else list(span)


def _numbers(about: Mapping[str, Any], at: Mapping[str, Any], prompt: int) -> dict[str, int]:
    """Return where a prompt has the positions that the sweep was given as texts or names."""
    positions = about.get("positions", {})
    named = [axis for axis in ("pos", "key") if isinstance(at.get(axis), str)]
    return {axis: positions[at[axis]][prompt] for axis in named}


def _address(about: Mapping[str, Any], at: Mapping[str, Any]) -> dict[str, Any]:
    """Return where a patch writes, as interventions name it."""
    site = site_named(at.get("component", about["site"])).name
    layer = None if site == "embed" else _layers(about, at)
    query = "query" if site in _SQUARES else "pos"
    where = {"site": site, "layer": layer, "head": at.get("head"), "neuron": at.get("neuron")}
    where |= {query: at.get("pos"), "key": at.get("key")}
    return {name: value for name, value in where.items() if value is not None}


def _knockout(about: Mapping[str, Any], at: Mapping[str, Any], prompt: int) -> Knockout:
    places = {}
    for axis in ("query", "key"):
        sets = about[axis]
        chosen = sets[str(at[axis])] if axis in at else next(iter(sets.values()))
        places[axis] = chosen[prompt][0] if len(chosen[prompt]) == 1 else chosen[prompt]
    heads = {"heads": at["head"]} if "head" in at else {}
    return Knockout(layers=_layers(about, at), **places, **heads)


# ------------------------------------------------------------------------------------ prompts


def _ids(about: Mapping[str, Any], name: str, prompt: int) -> list[int]:
    """Return a prompt's ids without the padding in front of it."""
    rows = about[name]
    return list(rows[prompt]) if len(rows) == 1 else _unpadded(rows[prompt], about)


def _unpadded(row: list[int], about: Mapping[str, Any]) -> list[int]:
    labels, first = about.get("labels", {}), 0
    while first < len(row) - 1 and labels.get(str(row[first])) == "<pad>":
        first += 1
    return row[first:]


def _reference(about: Mapping[str, Any], model: OPTForCausalLM | None) -> Tensor | list[str]:
    """Return the reference prompts as ids, or as texts where they are of unequal length."""
    rows = about["reference"]
    tokenizer = None if model is None else model.tokenizer
    pad = None if tokenizer is None else tokenizer.pad_token_id
    if len(rows) == 1 or pad is None or not any(row[0] == pad for row in rows):
        return torch.tensor(rows)
    ids = []
    for row in rows:
        first = next(place for place, token in enumerate(row) if token != pad)
        ids.append(row[first:])
    texts = [text_of(each, model) for each in ids]
    if None in texts:
        raise checks.InputError(
            "The reference prompts are of unequal length and cannot be written as text; give "
            "prompts of one length to see single ablations."
        )
    return texts


def text_of(ids: list[int], model: OPTForCausalLM | None) -> str | None:
    """Return a text that has these token ids; None if there is none."""
    tokenizer = None if model is None else model.tokenizer
    if tokenizer is None or not ids or ids[0] != tokenizer.bos_token_id:
        return None
    text = tokenizer.decode(ids[1:])
    return text if tokenizer.encode(text) == ids else None
