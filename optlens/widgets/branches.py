"""The texts that a generation and its forks wrote, step by step.

Step s of every branch of a text chooses its new token number s, counted from the first prompt. A fork
shares the steps before it with the branch that it came from, and so their distributions.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

if TYPE_CHECKING:
    from optlens.generation import Generation

SAMPLING = ("temperature", "top_k", "top_p")
_LOCKS: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()
_GUARD = threading.Lock()


def lock_of(model: Any) -> threading.RLock:
    """Return the lock under which views run a model.

    Frontends may answer on a thread of their own, and hooks of two runs at once would mix.
    """
    with _GUARD:
        return _LOCKS.setdefault(model, threading.RLock())


@dataclass(frozen=True, eq=False)
class Branch:
    """Hold one text with its prompt, and where its steps lie.

    Attributes:
        result: the generation that wrote the end of it.
        row: which of its texts.
        first: the first step that `result` chose.
        parent: the branch that it was forked from, by number; None for the first.
        step: the first step at which it may differ from that one.
        forced: whether the token at that step was given, not chosen.
    """

    result: Generation
    row: int
    first: int = 0
    parent: int | None = None
    step: int = 0
    forced: bool = False

    @property
    def ids(self) -> list[int]:
        """The tokens, prompt included, without padding."""
        result = self.result
        return result.sequences[self.row][result.mask[self.row]].tolist()

    @property
    def n_steps(self) -> int:
        """How many steps there are from the first prompt on."""
        return self.first + len(self.result.new_tokens[self.row])

    def logits_at(self, name: str, step: int) -> torch.Tensor | None:
        """Return "scores" or "logits" of one of its own steps, `[d_vocab]`; None if not kept."""
        kept = getattr(self.result, name)
        return None if kept is None else kept[step - self.first][self.row].float()


@dataclass(frozen=True)
class Candidates:
    """Hold what could have been chosen at one step.

    Attributes:
        ids: tokens `[k]`, the likeliest first; the chosen one is among them.
        own: their probabilities as the model gave them, `[k]`; None if not kept.
        after: their probabilities after processing, `[k]`; None if not kept.
        entropy: of both distributions, nats; NaN if not kept.
        allowed: how many tokens could be chosen.
        rank: the chosen token's, from 0.
    """

    ids: np.ndarray
    own: np.ndarray | None
    after: np.ndarray | None
    entropy: tuple[float, float]
    allowed: int
    rank: int


def candidates(
    logits: torch.Tensor | None, scores: torch.Tensor | None, chosen: int, top_k: int
) -> Candidates:
    """Return the likeliest tokens of one step before and after processing.

    Args:
        logits: as the model gave them, `[d_vocab]`, or None.
        scores: after processing, with -inf where nothing may be chosen, or None; not both.
        chosen: the token that was taken.
        top_k: how many to list.
    """
    own, after = (None if x is None else x.softmax(-1) for x in (logits, scores))
    order = own if own is not None else after
    best = order if after is None else torch.maximum(order, after)
    ids = best.topk(min(top_k, len(best))).indices
    if chosen not in ids:
        ids = torch.cat([ids[:-1], torch.tensor([chosen], device=ids.device)])
    ids = ids[order[ids].argsort(descending=True, stable=True)]
    kept = best if after is None else after
    return Candidates(
        ids.cpu().numpy().astype(np.int32),
        *(None if x is None else x[ids].cpu().numpy() for x in (own, after)),
        (_entropy(own), _entropy(after)),
        int((kept > 0).sum()),
        int((order > order[chosen]).sum()),
    )


def _entropy(probs: torch.Tensor | None) -> float:
    return float("nan") if probs is None else float(torch.special.entr(probs).sum())
