"""The strongest examples so far of many neurons at once, updated batch by batch.

Each window offers a neuron one candidate, its largest activation there, so no two examples overlap. Of candidates
whose context up to the token is the same text only the strongest stays. Both rules can be applied as the text
streams by: what has been dropped once can never belong to the end result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optlens.neurons.windows import Batch

NOTHING = -1  # where a context reaches beyond its window
_MULTIPLIER = 6364136223846793005  # of a 64-bit hash, which wraps around


class Best:
    """The `k` strongest examples of each neuron of one layer, strongest first.

    Attributes:
        values: Their activations, `[neuron, k]`; 0 where there is none.
        tokens: Their contexts, `[neuron, k, context]`.
        activations: The neuron's activation at each token of these, NaN outside the window.
        documents: Which document, `[neuron, k]`.
        offsets: The token's place in the document, `[neuron, k]`.
        positions: The token's position in its window, `[neuron, k]`.
    """

    def __init__(self, n_neurons: int, k: int, before: int, after: int, device: torch.device):
        """Start without any example."""
        shape, span = (n_neurons, k), before + 1 + after
        self.k, self.before = k, before
        self.reach = torch.arange(-before, after + 1, device=device)
        self.values = torch.zeros(shape, device=device)
        self.keys = torch.zeros(shape, dtype=torch.long, device=device)
        self.documents = torch.full(shape, NOTHING, device=device)
        self.offsets = torch.full(shape, NOTHING, device=device)
        self.positions = torch.full(shape, NOTHING, device=device)
        self.tokens = torch.full((*shape, span), NOTHING, dtype=torch.int32, device=device)
        self.activations = torch.full((*shape, span), torch.nan, device=device)

    def update(self, activations: Tensor, batch: Batch) -> None:
        """Let the windows of a batch offer their candidates.

        Args:
            activations: `[batch, pos, neuron]`, float32.
            batch: The windows.
        """
        counted = activations.masked_fill(~batch.counted[..., None], -torch.inf)
        top, place = counted.max(1)  # [batch, neuron]; the first of equal ones
        hits = top > self.values[:, -1]
        rows = hits.any(0).nonzero().flatten()  # neurons that have something new
        if len(rows) == 0:
            return
        window = torch.arange(len(top), device=top.device)
        place = place[:, rows].T  # [row, window]
        new = torch.where(hits, top, 0.0)[:, rows].T
        values = torch.cat([self.values[rows], new], 1)
        new_keys = self._keys(batch)[window, place]
        keys = torch.cat([self.keys[rows], new_keys], 1)
        kept = _strongest(values, keys, self.k)  # [row, k], indices into both parts
        self.values[rows], self.keys[rows] = values.gather(1, kept), keys.gather(1, kept)

        is_new = kept >= self.k
        row, slot = is_new.nonzero(as_tuple=True)
        which = kept[row, slot] - self.k
        at = place[row, which]
        old = kept.clamp(max=self.k - 1)
        documents, starts = batch.documents[which], batch.starts[which]
        self._set(self.documents, rows, old, is_new, documents)
        self._set(self.offsets, rows, old, is_new, starts + at)
        self._set(self.positions, rows, old, is_new, at)
        columns = at[:, None] + self.reach  # [new, context]
        inside = (columns >= 0) & (columns < batch.lengths[which, None])
        columns = columns.clamp(0, batch.tokens.shape[1] - 1)
        tokens = batch.tokens[which[:, None], columns].int().masked_fill(~inside, NOTHING)
        shown = activations[which[:, None], columns, rows[row, None]]
        self._set(self.tokens, rows, old, is_new, tokens)
        self._set(self.activations, rows, old, is_new, shown.masked_fill(~inside, torch.nan))

    def _set(self, table: Tensor, rows: Tensor, old: Tensor, is_new: Tensor, new: Tensor) -> None:
        """Put the examples of some neurons in their new order, and the new ones in their slots."""
        index = old if table.ndim == 2 else old[..., None].expand(-1, -1, table.shape[2])
        part = table[rows].gather(1, index)
        part[is_new] = new
        table[rows] = part

    def _keys(self, batch: Batch) -> Tensor:
        """Return a 64-bit hash of each token and those before it in its context, `[batch, pos]`."""
        pos = batch.tokens.shape[1]
        padded = torch.nn.functional.pad(batch.tokens, (self.before, 0), value=NOTHING)
        hashed = torch.zeros_like(batch.tokens)
        for shift in range(self.before + 1):
            hashed = hashed * _MULTIPLIER + padded[:, shift : shift + pos] + 2
        return hashed


def _strongest(values: Tensor, keys: Tensor, k: int) -> Tensor:
    """Return where the k largest values of each row are, of equal keys only the largest.

    Equal values keep their order, so that the earlier one wins.

    Args:
        values: `[row, n]`; set to 0 where they are beaten by another of the same key.
        keys: `[row, n]`.
        k: How many.

    Example:
        >>> _strongest(torch.tensor([[3.0, 5.0, 4.0, 5.0]]), torch.tensor([[1, 2, 2, 3]]), 3)
        tensor([[1, 3, 0]])
    """
    order = values.argsort(dim=1, descending=True, stable=True)
    by_key, place = keys.gather(1, order).sort(dim=1, stable=True)
    again = torch.zeros_like(by_key, dtype=torch.bool)
    again[:, 1:] = by_key[:, 1:] == by_key[:, :-1]
    beaten = torch.zeros_like(again).scatter(1, order.gather(1, place), again)
    values.masked_fill_(beaten, 0.0)
    return values.argsort(dim=1, descending=True, stable=True)[:, :k]
