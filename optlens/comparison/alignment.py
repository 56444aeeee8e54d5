"""Which token of one prompt stands where another stands in a second prompt.

Prompts of one length are aligned position by position, as patching takes them. Others are aligned by the edits that
turn one into the other (difflib's matching blocks): tokens in common are paired, a stretch that was replaced by one
of the same length is paired token by token, and what was added or left out stands alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher

Column = tuple[int | None, int | None]


def align(first: Sequence[int], second: Sequence[int]) -> list[Column]:
    """Pair the positions of two token sequences, in their order.

    Args:
        first: Token ids of one prompt.
        second: Those of the other.

    Returns:
        Pairs of positions; None on the side that has no counterpart.

    Example:
        >>> align([2, 10, 11, 12], [2, 10, 99, 11, 12])
        [(0, 0), (1, 1), (None, 2), (2, 3), (3, 4)]
    """
    if len(first) == len(second):
        return [(pos, pos) for pos in range(len(first))]
    columns: list[Column] = []
    # difflib would else take tokens that are frequent in long prompts for noise
    matcher = SequenceMatcher(None, list(first), list(second), autojunk=False)
    for _, start_a, end_a, start_b, end_b in matcher.get_opcodes():
        here, there = range(start_a, end_a), range(start_b, end_b)
        if len(here) == len(there):
            columns += zip(here, there, strict=True)
        else:
            columns += [(pos, None) for pos in here] + [(None, pos) for pos in there]
    return columns


def column_labels(
    columns: Sequence[Column], first: Sequence[str], second: Sequence[str]
) -> list[str]:
    """Name aligned positions by their tokens.

    A token in common is written once, a replaced one as "old | new", one of only the first prompt
    as "old | " and one of only the second as " | new".

    Args:
        columns: What `align` returned.
        first: Legible tokens of the first prompt.
        second: Those of the second.

    Example:
        >>> column_labels([(0, 0), (1, 1), (None, 2)], ["A", "cat"], ["A", "dog", "ran"])
        ['A', 'cat | dog', ' | ran']
    """
    names = []
    for a, b in columns:
        one = "" if a is None else first[a]
        other = "" if b is None else second[b]
        names.append(one if one == other else f"{one} | {other}")
    return names
