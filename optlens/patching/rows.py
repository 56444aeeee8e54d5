"""Which patches change anything, from which block and column on.

A patch that writes what is already there needs no run. In a patching sweep that is so before the
first token in which the two prompts differ, where both runs are equal by causality, and wherever
the two runs have the same value, such as a neuron that is off in both.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from optlens import checks
from optlens.patching.base_run import BaseRun
from optlens.patching.grid import Cell, Grid
from optlens.patching.group import Row


def rows_of(
    grid: Grid,
    base: BaseRun,
    sources: dict[str, list[Tensor]],
    reads: Tensor,
    equal_before: Tensor | None = None,
) -> list[Row]:
    """Find the runs that a sweep needs.

    Args:
        grid: The patches.
        base: The unpatched run.
        sources: What patches write, for each site one tensor `[prompts, pos, ...]` a layer.
        reads: The columns that the metric reads, `[prompts, n]` on the CPU.
        equal_before: The first column in which the two prompts differ, `[prompts]` on the CPU:
            before it nothing changes. None if that is not known.

    Returns:
        A row for every patch of every prompt that can change the metric, in the order of the grid.
    """
    columns, n_layers = grid.columns.tolist(), len(base.values["resid_pre"])
    read_columns = [set(row) for row in reads.tolist()]
    last_read = [max(row) for row in read_columns]

    @cache
    def changes(name: str, layer: int, head: int | None, neuron: int | None, key: int | None):
        """Tell where a site's value changes, `[prompts, pos]`."""
        changed = _changed(name, layer)
        if key is not None:
            at_key = np.array([row[key] for row in columns])
            changed = changed[np.arange(len(at_key)), ..., at_key]
        elif name in ("attn_scores", "pattern"):
            changed = changed.any(-1)
        if head is not None:
            changed = changed[:, :, head]
        if neuron is not None:
            changed = changed[:, :, neuron]
        return changed.any(tuple(range(2, changed.ndim))) if changed.ndim > 2 else changed

    @cache
    def _changed(name: str, layer: int):
        """Compare a site's values with what would be written, without the innermost axis."""
        differ = base.values[name][layer] != sources[name][layer]
        changed = checks.on_host(differ)
        if changed is None:  # a rehearsal, in which nothing has a value: all may change
            changed = torch.ones(differ.shape, dtype=torch.bool)
        changed[~base.seen] = False
        if equal_before is not None:
            before = torch.arange(changed.shape[1]) < equal_before[:, None]
            changed[before] = False
        if name not in ("mlp_pre", "mlp_post", "attn_scores", "pattern"):
            changed = changed.any(-1)  # [prompts, pos] or [prompts, pos, head]
        return changed.numpy()

    def row_of(cell: Cell, prompt: int) -> Row | None:
        start, first = None, None
        for layer in cell.layers:
            if cell.cut is not None:
                where = grid.cuts.changed(*cell.cut)[prompt]
            else:
                where = changes(cell.site.name, layer, cell.head, cell.neuron, cell.key)[prompt]
            if cell.pos is not None:
                column = columns[prompt][cell.pos]
                found = column if where[column] else None
            else:
                found = int(where.argmax()) if where.any() else None
            if found is not None:
                start = layer if start is None else start
                first = found if first is None else min(first, found)
        if first is None or first > last_read[prompt]:
            return None
        if start == n_layers - 1 and not cell.site.spreads:
            reached = {first} if cell.pos is not None else set(where.nonzero()[0].tolist())
            if not reached & read_columns[prompt]:
                return None
        return Row(cell, prompt, start, first)

    found = (row_of(cell, prompt) for cell in grid.cells for prompt in range(len(columns)))
    return [row for row in found if row is not None]
