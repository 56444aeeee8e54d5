"""What a recording is asked for: names, layers, heads, positions.

Whatever a caller may write in `what=`, `layers=`, `heads=` and `pos=` becomes plain lists here,
before anything runs, or is refused with what there is to choose from.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from optlens.checks import InputError
from optlens.config import OPTConfig
from optlens.names import BLOCK, UnknownHookError, get_act_name, hook_names, is_full_name, suggest
from optlens.recording import WHAT

Selection = int | Iterable[int] | slice | None

# Short names that stand for one hook in every layer; those of ln1 and ln2 need their part beside.
SHORT_NAMES = [spec.name.rpartition("hook_")[2] for spec in BLOCK if not spec.name.startswith("ln")]


def resolve_what(what: str | Iterable[str], config: OPTConfig) -> list[str]:
    """Return what to record, each once: words of `WHAT`, short names, full hook names.

    A short name that means one hook only ("embed", "k2", "scale4ln1") becomes its full name; one
    that means a hook in every layer ("z") stays as it is.

    Raises:
        InputError: If there is nothing to record.
        UnknownHookError: If a name is unknown; the nearest are suggested.

    Example:
        >>> resolve_what(("attention", "z", "k2", "embed"), OPTConfig())
        ['attention', 'z', 'blocks.2.attn.hook_k', 'hook_embed']
    """
    wanted = [what] if isinstance(what, str) else list(what)
    if not wanted:
        raise InputError(f"Nothing to record: name some of {', '.join(WHAT)} in what=.")
    hooks = hook_names(config)
    return list(dict.fromkeys(_resolve_name(name, hooks) for name in wanted))


def _resolve_name(name: str, hooks: list[str]) -> str:
    if name in WHAT or (not is_full_name(name) and get_act_name(name, 0) in hooks):
        return name
    full = get_act_name(name)
    if full not in hooks:
        raise UnknownHookError(
            f"what={name!r} is none of {', '.join(WHAT)}, and this model has no hook of that name. "
            f"{suggest(name, [*WHAT, *SHORT_NAMES, *hooks])}"
        )
    return full


def select(selection: Selection, size: int, what: str) -> list[int]:
    """Turn a selection into non-negative numbers, checked against how many there are.

    Args:
        selection: A number, several (a list, a tensor, an array), or a slice; None for all.
        size: How many there are to choose from.
        what: The argument's name, for errors.

    Raises:
        InputError: If it selects nothing, what is not there, or by something else than numbers.

    Example:
        >>> select([0, -1], 12, "layers")
        [0, 11]
    """
    if selection is None:
        return list(range(size))
    if isinstance(selection, slice):
        return _checked(list(range(size)[selection]), selection, size, what)
    return _checked(_whole_numbers(selection, what), selection, size, what)


def show(selection: Any) -> str:
    """Write a selection as a user would: `range(0, 4)` for (0, 1, 2, 3)."""
    if type(selection) is tuple:
        numbers = [item for item in selection if isinstance(item, int)]
        if len(numbers) == len(selection) > 2:
            run = range(numbers[0], numbers[0] + len(numbers))
            if selection == tuple(run):
                return repr(run)
        return f"[{', '.join(map(show, selection))}]"
    if isinstance(selection, slice):
        parts = [selection.start, selection.stop, selection.step]
        return f"slice({', '.join(map(str, parts if selection.step else parts[:2]))})"
    return repr(selection)


def _checked(chosen: list[int], selection: Selection, size: int, what: str) -> list[int]:
    if not chosen:
        raise InputError(f"{what}={show(selection)} selects nothing; there are {size}.")
    for index in chosen:
        if not -size <= index < size:
            raise InputError(
                f"{what}={show(selection)} asks for {index}, but there are {size}: "
                f"0 to {size - 1}, or -1 to -{size} from the end."
            )
    return [index % size for index in chosen]


def _whole_numbers(selection: Any, what: str) -> list[int]:
    """Return the numbers of a selection as they were given; tensors and arrays may hold them."""
    given = _plain(selection)
    items = [_plain(item) for item in given] if isinstance(given, Iterable) else [given]
    for item in items:
        if not isinstance(item, int) or isinstance(item, bool):
            raise InputError(
                f"{what}={selection!r} must be a whole number, several of them, or a slice; "
                f"{item!r} is none."
            )
    return items


def _plain(value: Any) -> Any:
    """Return Python's own numbers for those of torch and NumPy."""
    return value.tolist() if hasattr(value, "tolist") else value


def select_positions(pos: Selection, real: Tensor) -> tuple[list[int], Tensor | None]:
    """Resolve positions, which count each prompt's real tokens, to columns of the padded batch.

    Args:
        pos: What was asked for.
        real: True at real tokens, `[batch, pos]`.

    Returns:
        The positions as they are to be called: non-negative where all prompts are without padding,
        as they were asked for where they are not. And their columns, `[batch, n]`; None for all.

    Raises:
        InputError: If a position lies outside the shortest prompt, or a slice means other positions
            in one prompt than in another.
    """
    if pos is None:
        return list(range(real.shape[1])), None
    lengths = real.sum(-1).tolist()
    asked = _of_slice(pos, lengths) if isinstance(pos, slice) else _whole_numbers(pos, "pos")
    chosen = _checked(asked, pos, min(lengths), "pos")
    places = [row.nonzero().flatten() for row in real]  # columns of each prompt's real tokens
    columns = torch.stack([place[torch.tensor(asked)] for place in places])
    return (chosen if bool(real.all()) else asked), columns


def _of_slice(pos: slice, lengths: list[int]) -> list[int]:
    """Return the numbers that a slice selects in prompts of several lengths.

    They count from the front where that is the same in all prompts, else from the end.
    """
    chosen = [list(range(length)[pos]) for length in lengths]
    if all(numbers == chosen[0] for numbers in chosen):
        return chosen[0]
    from_end = [
        [number - length for number in numbers]
        for numbers, length in zip(chosen, lengths, strict=True)
    ]
    if all(numbers == from_end[0] for numbers in from_end):
        return from_end[0]
    raise InputError(
        f"pos={show(pos)} selects {', '.join(str(len(numbers)) for numbers in chosen)} positions in "
        f"prompts of {', '.join(map(str, lengths))} tokens, not the same ones in each: choose "
        f"such that every prompt has them (the shortest has {min(lengths)}), or take pos=None "
        "for all, padding included."
    )
