"""A run as the Python code that makes it again.

What can be written is written: numbers, texts, token ids, positions. Long tensors and recorded runs
cannot; the code takes these from the view, which it calls `explorer`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from optlens.interventions import Intervention, Steer
from optlens.interventions.held import HeldRun
from optlens.interventions.intervention import PROMPTS
from optlens.selection import show

if TYPE_CHECKING:
    from optlens.inputs import Prompt

_WRITTEN = 600  # numbers of a tensor that are written out


def code_of(
    prompt: Prompt,
    interventions: Sequence[Intervention] = (),
    options: Mapping[str, Any] | None = None,
) -> str:
    """Return code that records a prompt under interventions, with `model` as the model.

    Args:
        prompt: What `model.record` takes.
        interventions: What is in force.
        options: Further arguments of `model.record`.

    Example:
        >>> from optlens import Ablate
        >>> print(code_of("The cat", [Ablate("z", layer=3, head=2)]))
        import optlens
        <BLANKLINE>
        rec = model.record(
            'The cat',
            interventions=[
                optlens.Ablate('z', layer=3, head=2),
            ],
        )
    """
    given = [f"    {_literal(prompt, 'explorer.prompt')},"]
    if interventions:
        calls = [call_of(each, number) for number, each in enumerate(interventions)]
        given += ["    interventions=[", *(f"        optlens.{call}," for call in calls), "    ],"]
    for name, value in (options or {}).items():
        # a recording has its padding mask under the shorter name, as booleans
        held = "mask.long()" if name == "attention_mask" else name
        given.append(f"    {name}={_literal(value, f'explorer.recording.{held}')},")
    body = "\n".join(given)
    torch = "import torch\n" if "torch." in body else ""
    return f"import optlens\n{torch}\nrec = model.record(\n{body}\n)"


def call_of(intervention: Intervention, number: int) -> str:
    """Return the call that makes an intervention, whose place in `explorer.interventions` is given."""
    parts = []
    for field in dataclasses.fields(intervention):
        value = getattr(intervention, field.name)
        if not isinstance(value, Tensor | HeldRun) and value == field.default:
            continue
        first = field.name == "site" and not isinstance(intervention, Steer)
        where = f"explorer.interventions[{number}].{field.name}"
        if field.name in PROMPTS and isinstance(value, tuple):
            text = repr(value[0]) if len(value) == 1 else repr(list(value))
        else:
            text = _literal(value, where)
        parts.append(text if first else f"{field.name}={text}")
    return f"{type(intervention).__name__}({', '.join(parts)})"


def _literal(value: Any, where: str) -> str:
    """Write a value as Python reads it, or else the expression under which the view has it."""
    if isinstance(value, Tensor):
        short = value.numel() <= _WRITTEN and bool(value.isfinite().all())
        return f"torch.tensor({value.tolist()}, dtype={value.dtype})" if short else where
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    return where if isinstance(value, HeldRun) else show(value)
