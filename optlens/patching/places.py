"""Positions of a sweep that are given by a token's text or by a name, as in interventions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optlens import checks
from optlens.interventions.address import Place, as_place, items_of
from optlens.interventions.passes import Pass
from optlens.selection import select_positions, show

if TYPE_CHECKING:
    from optlens.model import OPTForCausalLM

# Numbers, a slice, texts, `(" John", 1)`, names of spans, and lists of these; None for all.
Positions = int | str | tuple[str, int] | slice | Iterable[int | str | tuple[str, int]] | None


@dataclass(frozen=True, eq=False)
class Places:
    """Positions that were looked up.

    Attributes:
        entries: What the entries of the axis stand for: numbers; in several prompts, which may have
            a word at different positions, what was asked for.
        columns: Where they are in each prompt's row, `[prompts, entries]`.
        positions: For each entry that is a text, its position in each prompt.
    """

    entries: list[int | str]
    columns: Tensor
    positions: dict[str, list[int]]


def places_of(
    model: OPTForCausalLM,
    tokens: Tensor,
    real: Tensor,
    given: Positions,
    spans: Mapping[str, Any] | None = None,
) -> Places | Positions:
    """Look up the texts and names among the positions of a sweep.

    Args:
        model: The model, for its tokenizer.
        tokens: Token ids, `[prompts, pos]`.
        real: True at real tokens, `[prompts, pos]` on the CPU.
        given: What was asked for.
        spans: Names for positions, as `model.intervene` takes them.

    Returns:
        What was asked for, as it was given where it is numbers alone.

    Raises:
        InputError: If a token occurs in a prompt never or several times, a name is unknown, a
            position does not exist, or a span has not as many positions in each prompt.
    """
    if given is None or isinstance(given, slice):
        return given
    items = items_of(as_place(given, "positions"))
    if all(isinstance(item, int) for item in items):
        return given
    at = Pass(real, real.shape[1], tokens, tokenizer=model.tokenizer, spans=dict(spans or {}))
    entries, columns, positions = [], [], {}
    for item in items:
        if isinstance(item, int):
            numbers, found = select_positions([item], real)
            entries, columns = entries + numbers, [*columns, found]
            continue
        found = _columns(at, item)
        numbers = at.positions.gather(1, found).T.tolist()  # [position of the item][prompt]
        columns.append(found)
        if at.batch == 1:
            entries += [number for (number,) in numbers]
            continue
        word = item if isinstance(item, str) else show(item)
        words = [word] if len(numbers) == 1 else [f"{word} {n}" for n in range(len(numbers))]
        entries, positions = entries + words, positions | dict(zip(words, numbers, strict=True))
    return Places(entries, torch.cat(columns, dim=1), positions)


def _columns(at: Pass, item: Place) -> Tensor:
    """Return where a text or a name stands in each prompt's row, `[prompts, n]`."""
    chosen = at.choose(item, "positions")
    counts = (chosen.slots >= 0).sum(-1).tolist()
    if len(set(counts)) > 1:
        raise checks.InputError(
            f"positions={show(item)} are {counts} positions in the prompts; a sweep goes through "
            "them one at a time and needs as many in each. Name single ones, such as the last."
        )
    return torch.stack([(chosen.slots == n).int().argmax(-1) for n in range(counts[0])], dim=1)


def looked_up(positions: Places | Positions) -> dict[str, dict[str, list[int]]]:
    """Return, for a result's metadata, where each prompt has what was given as texts or names."""
    found = positions.positions if isinstance(positions, Places) else {}
    return {"positions": found} if found else {}
