"""Simple scores of attention heads by which a grid of heads can be sorted.

Each is a mean over the recorded queries of one prompt, the first token left out where it has no
choice: it can only read itself. Patterns come as NumPy or torch, and only what a score reads is
widened to float32: in half precision, that alone would take longer than all else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from optlens.report.one_prompt import as_numpy


@dataclass(frozen=True)
class Score:
    """Describe one score.

    Attributes:
        label: its name, as a menu shows it.
        meaning: a sentence for people.
        ascending: whether a sorted grid begins with the smallest.
        compute: from patterns `[head, query, key]` and the queries' positions to `[head]`.
        reads_all: whether it must read every weight, which takes time on long prompts.
    """

    label: str
    meaning: str
    ascending: bool
    compute: Callable[[Any, np.ndarray], np.ndarray]
    reads_all: bool = False


def previous_token(pattern: Any, positions: np.ndarray) -> np.ndarray:
    """Return the mean weight that each query gives to the token before it, `[head]`."""
    rows = np.flatnonzero(positions > 0)
    return _mean(pattern[:, rows, positions[rows] - 1])


def first_token(pattern: Any, positions: np.ndarray) -> np.ndarray:
    """Return the mean weight that each query gives to the first token, `[head]`."""
    return _mean(pattern[:, positions > 0, 0])


def own_token(pattern: Any, positions: np.ndarray) -> np.ndarray:
    """Return the mean weight that each query gives to itself, `[head]`."""
    rows = np.flatnonzero(positions > 0)
    return _mean(pattern[:, rows, positions[rows]])


def entropy(pattern: Any, positions: np.ndarray) -> np.ndarray:
    """Return the mean entropy of the queries' weights in nats, `[head]`; 0 reads one token."""
    chosen = as_numpy(pattern[:, positions > 0]).astype(np.float32, copy=False)
    # The logarithm of a weight of 0 is never wanted: it comes with the factor 0.
    logs = np.log(np.maximum(chosen, np.finfo(np.float32).tiny))
    return _mean(-np.einsum("hqk,hqk->hq", chosen, logs))


SCORES: dict[str, Score] = {
    "entropy": Score(
        "entropy",
        "How widely a head spreads its weight, in nats: 0 reads one token alone.",
        True,
        entropy,
        reads_all=True,
    ),
    "previous": Score("previous token", "Mean weight on the token before.", False, previous_token),
    "first": Score("first token", "Mean weight on the first token.", False, first_token),
    "self": Score("itself", "Mean weight on the token itself.", False, own_token),
}


def _mean(values: Any) -> np.ndarray:
    """Return the mean over queries; 0 where a prompt has the first token alone."""
    values = as_numpy(values)
    if values.shape[1] == 0:
        return np.zeros(len(values), np.float32)
    return values.mean(axis=1, dtype=np.float64).astype(np.float32)
