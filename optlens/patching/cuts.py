"""Edges of attention that are cut: sets of queries and sets of keys, whose scores become -inf."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Cuts:
    """Sets of querying and of attended columns; a cut joins one of each.

    Attributes:
        queries: True at the columns of each set that do not see, `[set, prompts, pos]`.
        keys: True at the columns of each set that they do not see, `[set, prompts, pos]`.
    """

    def __init__(self, queries: Tensor, keys: Tensor, real: Tensor) -> None:
        """Keep the sets.

        Args:
            queries: As the attribute.
            keys: As the attribute.
            real: True at real tokens, `[prompts, pos]`; all three are on the CPU.
        """
        self.queries, self.keys = queries & real, keys & real
        self._queries = self.queries.numpy()
        # a query sees a key of the set if there is one at or before its own column
        self._in_sight = self.keys.cumsum(-1).gt(0).numpy()

    def changed(self, query: int, key: int) -> np.ndarray:
        """Tell at which columns something is cut that was there, `[prompts, pos]`."""
        return self._queries[query] & self._in_sight[key]

    def apply(
        self, scores: Tensor, query: int, key: int, prompt: int, columns: Sequence[int]
    ) -> None:
        """Cut, in place.

        Args:
            scores: The scores of one run at some columns, `[pos, head, key]`.
            query: Which set of queries.
            key: Which set of keys.
            prompt: The prompt of the run.
            columns: The columns that `scores` holds.
        """
        here = self.queries[query, prompt][torch.as_tensor(columns)]
        cut = here[:, None] & self.keys[key, prompt]
        scores.masked_fill_(cut.unsqueeze(1).to(scores.device), -torch.inf)
