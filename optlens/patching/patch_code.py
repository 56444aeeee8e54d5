"""One patch of a sweep as Python code to copy."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from optlens.interventions import Freeze, Intervention, describe
from optlens.patching.one_patch import OnePatch, text_of

if TYPE_CHECKING:
    from optlens.model import OPTForCausalLM


def code_of(
    patch: OnePatch,
    model: OPTForCausalLM | None = None,
    standing: Sequence[Intervention] = (),
    spans: Mapping[str, Any] | None = None,
) -> str:
    """Return code that makes a patch with `model.intervene`; a `model` is all that it needs.

    Args:
        patch: The patch.
        model: The model, if at hand: prompts are then written as text, not as token ids.
        standing: The interventions under which the sweep ran.
        spans: Names for positions in them.

    Example:
        >>> import torch
        >>> from optlens import Freeze
        >>> freeze = Freeze("z", layer=3, head=1, source=torch.tensor([[2, 7]]))
        >>> print(code_of(OnePatch(freeze, [2, 9], "corrupt", [2, 7], "clean")))
        import torch
        from optlens import Freeze
        <BLANKLINE>
        clean = torch.tensor([[2, 7]])
        corrupt = torch.tensor([[2, 9]])
        patch = Freeze('z', layer=3, head=1, source=clean)
        with model.intervene([patch]):
            logits = model(corrupt).logits[0, -1]  # after the last token
        <BLANKLINE>
    """
    written, lines = patch.intervention, []
    if patch.source is not None:
        lines.append(f"{patch.source_name} = {_prompt(patch.source, model)}")
    lines.append(f"{patch.name} = {_prompt(patch.tokens, model)}")
    if getattr(written, "reference", None) is not None:
        lines.append(f"reference = {_prompts(written.reference, model)}")
    kinds, source = {type(written).__name__}, patch.source_name
    named = f", spans={spans!r}" if standing and spans else ""
    if standing:
        lines.append(_list_of(standing, kinds))
        if isinstance(written, Freeze) and source != "reference":
            recorded = f"{source}, what={written.site!r}, interventions=standing{named}"
            lines.append(f"source = model.record({recorded})")
            source = "source"
    lines.append(f"patch = {_call(written, source)}")
    lines.append(f"with model.intervene([{'*standing, ' * bool(standing)}patch]{named}):")
    lines.append(f"    logits = model({patch.name}).logits[0, -1]  # after the last token")
    head = [f"from optlens import {', '.join(sorted(kinds))}", ""]
    if any("torch." in line for line in lines):
        head.insert(0, "import torch")
    return "\n".join([*head, *lines]) + "\n"


def _list_of(standing: Sequence[Intervention], kinds: set[str]) -> str:
    """Write the sweep's own interventions, those with tensors or prompts in them as a comment."""
    listed = f"[{', '.join(map(repr, standing))}]"
    if "<" in listed or any(describe(each)["tensors"] for each in standing):
        return f"standing = interventions  # as the sweep was given them: {listed}"
    kinds |= {type(each).__name__ for each in standing}
    return f"standing = {listed}"


# `repr` writes marks that hide or turn round what follows as escapes: code reads as it runs.
def _prompt(ids: list[int], model: OPTForCausalLM | None) -> str:
    text = text_of(ids, model)
    return f"torch.tensor([{ids}])" if text is None else repr(text)


def _prompts(given: Tensor | tuple[str, ...], model: OPTForCausalLM | None) -> str:
    if not isinstance(given, Tensor):
        return f"[{', '.join(map(repr, given))}]"
    texts = [text_of(row, model) for row in given.tolist()]
    if None in texts:
        return f"torch.tensor({given.tolist()})"
    return f"[{', '.join(map(repr, texts))}]"


def _call(written: Intervention, source: str) -> str:
    """Write the call that makes an intervention; what is as by default is left out."""
    parts, last = [], []
    for field in dataclasses.fields(written):
        given = getattr(written, field.name)
        if field.name in ("source", "reference") and given is not None:
            last.append(f"{field.name}={source if field.name == 'source' else 'reference'}")
        elif field.name == "site":
            parts.append(repr(given))
        elif given is not None and given != field.default:
            shown = list(given) if isinstance(given, tuple) else given
            parts.append(f"{field.name}={shown!r}")
    return f"{type(written).__name__}({', '.join(parts + last)})"
