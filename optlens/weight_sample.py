"""A few numbers of a weight that tell it from others."""

from __future__ import annotations

import torch
from torch import Tensor


def weight_sample(weight: Tensor) -> Tensor:
    """Return numbers of a weight that lie on diagonals and meet each of its rows and columns.

    Which ones depends on the shape alone.

    Args:
        weight: A vector, which is returned whole, or a matrix.

    Returns:
        A vector; of a matrix, as long as its longer side.

    Example:
        >>> weight_sample(torch.arange(6).view(2, 3))
        tensor([0, 4, 2])
    """
    if weight.ndim == 1:
        return weight
    rows, columns = weight.shape
    if columns % rows == 0:  # of each row as many neighbours as it takes: they come together
        return weight.view(rows, rows, -1).diagonal().t().flatten()
    if rows < columns:
        return weight_sample(weight.t())
    whole = rows - rows % columns  # a stack of squares, whose diagonals are views
    squares = weight[:whole].view(-1, columns, columns).diagonal(0, 1, 2).flatten()
    return squares if whole == rows else torch.cat([squares, weight[whole:].diagonal()])
