"""Patched runs on their way through the blocks: one by one, and in groups that go together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optlens.patching.grid import Cell


@dataclass(frozen=True, slots=True)
class Row:
    """One patch of one prompt.

    Attributes:
        cell: The patch.
        prompt: Which prompt.
        layer: The first block in which the patch changes something.
        first: The first column that it changes.
    """

    cell: Cell
    prompt: int
    layer: int
    first: int


@dataclass(eq=False)
class Group:
    """Runs that go through a block together: their changes begin at one column.

    Attributes:
        first: That column.
        rows: The runs.
        prompts: The prompt of each run, `[run]`.
        columns: The column of each entry of `x`, `[run, pos]`. Entries before `first`, if any, hold
            nothing of use.
        x: The value that flows, `[run, pos, ...]`.
        stream: The residual stream that the next sub-layer's output is added to.
        site: What `x` is, for runs that start inside attention.
        contiguous: Whether `columns` count up from `first`.
        changed: How many of the first columns differ from the unpatched run's at the start of a
            block; None if any may.
    """

    first: int
    rows: list[Row]
    prompts: Tensor
    columns: Tensor
    x: Tensor
    stream: Tensor | None = None
    site: str = "resid_pre"
    contiguous: bool = True
    changed: int | None = None

    @property
    def new(self) -> Tensor:
        """The columns that may differ from the unpatched run's at the start of a block."""
        return self.x if self.changed is None else self.x[:, : self.changed]

    def go_to(self, device: torch.device) -> None:
        """Move to the device of the next block."""
        self.x, self.stream = self.x.to(device), None  # the stream was added
        self.prompts, self.columns = self.prompts.to(device), self.columns.to(device)

    def only(self, columns: Tensor) -> None:
        """Keep some columns, `[run, n]`; those before `first` become copies of it."""
        places = (columns - self.first).clamp(min=0)
        places = places.unsqueeze(-1).expand(-1, -1, self.x.shape[-1])
        self.x, self.stream = self.x.gather(1, places), self.stream.gather(1, places)
        self.columns, self.contiguous, self.changed = columns, False, None
