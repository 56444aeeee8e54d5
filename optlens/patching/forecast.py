"""What a patching sweep will take in memory, from the model's config and the length of the prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from optlens.config import OPTConfig
from optlens.names import get_act_name, shape_of
from optlens.patching.base_run import ONCE, runs_together, values_kept
from optlens.patching.budget import compiled_bytes, share_of
from optlens.patching.grid import make_grid
from optlens.patching.plan import MOST_TOKENS, chunks_of, patches_of
from optlens.patching.sites import names_of
from optlens.patching.wave import Row
from optlens.patching.wave_bytes import portion_bytes, unpatched_bytes

# So many are laid out to find the largest, as each begins at another position.
_PORTIONS = 16


def sweep_bytes(
    config: OPTConfig,
    pos: int,
    batch: int = 1,
    itemsize: int = 4,
    site: str | Sequence[str] = "resid_pre",
    over: str | Sequence[str] = ("layer", "pos"),
    memory_budget: int | None = None,
) -> tuple[int, int]:
    """Return the bytes of both recorded runs and of the largest portion of patched runs.

    The prompts are taken to differ from the first word on, and the metric to read the last
    position; prompts that differ later take less.

    Args:
        config: The model's config.
        pos: Tokens of each prompt.
        batch: Pairs of prompts.
        itemsize: Bytes of a number.
        site: What is patched, as in `patch_sweep`.
        over: The axes.
        memory_budget: As in `patch_sweep`; without one, a sweep whose largest portion is more than
            half of what is free takes smaller ones than are counted here.

    Returns:
        Bytes of the tensors, and how many more a process on the CPU may hold in gaps of its heap:
        as much as portions are bounded by.

    Raises:
        InputError: If site and axes do not fit together.

    Example:
        >>> sweep_bytes(OPTConfig.from_name("opt-125m"), pos=15)[0] < 2**30
        True
    """
    names = names_of(site)
    kept = sum(_value_bytes(config, n, batch, pos, itemsize) for n in values_kept(names))
    written = sum(_value_bytes(config, name, batch, pos, itemsize) for name in names)
    recorded = kept + written
    if "resid_post" not in names:  # of both runs what the metric reads, of the last block alone
        recorded += 2 * batch * pos * config.d_model * itemsize
    real = torch.ones(batch, pos, dtype=torch.bool)
    grid = make_grid(config, site, over, real, layers=_telling_layers(config, pos, over))
    rows = []
    for cell in grid.cells:
        first = 1 if cell.pos is None else cell.pos  # the leading </s> is the same in both
        in_last = cell.layers[0] == config.n_layers - 1 and not cell.site.spreads
        unread = in_last and cell.pos not in (None, pos - 1)
        if first > 0 and not unread:
            rows += [Row(cell, prompt, cell.layers[0], first) for prompt in range(batch)]
    patches = patches_of(rows, config, pos, itemsize)
    largest = max((size for _, size in patches), default=0)
    budget = recorded + sum(size for _, size in patches)
    if memory_budget is not None:
        left = memory_budget - recorded - compiled_bytes(config)
        budget = share_of(left, largest)
    portions = list(chunks_of(patches, pos, budget))
    tensors = portion_bytes(portions, config, pos, itemsize)
    together = kept - written if runs_together(batch * pos, memory_budget) else None
    tensors = max(tensors, unpatched_bytes(config, batch, pos, itemsize, together))
    room = max((size for _, size in portions), default=0)
    return recorded + tensors, max(0, room - tensors)


def _telling_layers(config: OPTConfig, pos: int, over: str | Sequence[str]) -> range | None:
    """Return as many layers as fill some portions: the patches of the others are like theirs."""
    if "layer" not in over:
        return None
    of_a_layer = pos * (pos // 2 + 1) if "pos" in over else pos
    return range(min(config.n_layers, 1 + _PORTIONS * MOST_TOKENS // max(of_a_layer, 1)))


def _value_bytes(config: OPTConfig, name: str, batch: int, pos: int, itemsize: int) -> int:
    """Count what is recorded of a site, in all layers."""
    layers = 1 if name in ONCE else config.n_layers
    hook = get_act_name(name, None if name in ONCE else 0)
    return layers * torch.Size(shape_of(hook, config, batch, pos)).numel() * itemsize
