"""Sweeps over the neurons that matter: those whose patch is estimated to change the metric most.

An MLP has thousands of neurons, and most patches of one change next to nothing. Attribution patching
(see `attribution`) estimates all of them by one backward pass, so that only the largest need be run.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optlens import checks
from optlens.patching.attribution import Estimator
from optlens.patching.base_run import BaseRun
from optlens.patching.gradients import differentiable_metric
from optlens.patching.grid import Grid
from optlens.patching.measure import AnyMetric, Measure
from optlens.selection import Selection

if TYPE_CHECKING:
    from optlens.model import OPTForCausalLM


def check_top(count: int | None, neurons: Selection, over: list[str], d_mlp: int) -> None:
    """Check what was asked for.

    Args:
        count: How many neurons; None for a sweep that does not choose.
        neurons: Those that were named besides.
        over: The axes of the sweep.
        d_mlp: How many neurons a block has.

    Raises:
        InputError: If it does not fit together.
    """
    if count is None:
        return
    if neurons is not None:
        raise checks.InputError(
            f"neurons= names the neurons to sweep and top_neurons={count!r} chooses them; give one "
            "of the two."
        )
    if "neuron" not in over:
        raise checks.InputError(
            f"top_neurons={count!r} chooses entries of the axis 'neuron', which is not among "
            f"over={tuple(over)}; add it, at the site mlp_pre or mlp_post."
        )
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= d_mlp:
        raise checks.InputError(
            f"top_neurons={count!r}: give a whole number from 1 to {d_mlp}, the neurons of a block; "
            "without it all are swept."
        )


def strongest_neurons(
    model: OPTForCausalLM,
    base: BaseRun,
    sources: dict[str, list[Tensor]],
    finals: tuple[Tensor, Tensor | None],
    metric: AnyMetric | None,
    grid: Grid,
    count: int,
) -> list[int]:
    """Find the neurons whose patches are estimated to change the metric most.

    The change is the mean over prompts, as in the result, and of a neuron the largest that it makes
    at any entry of the other axes; where a patch writes several blocks, each is taken by itself.

    Args:
        model: The model, with the sweep's interventions attached, if there are any.
        base: The unpatched run.
        sources: What patches write, for each site one tensor `[prompts, pos, d_mlp]` a layer.
        finals: The last residual streams of the clean and the corrupt run.
        metric: What to measure.
        grid: The sweep's patches; its neurons do not matter.
        count: How many neurons.

    Returns:
        Their numbers, in increasing order.

    Raises:
        InputError: If the metric has no gradient that says something.
    """
    every = {"layer": list(grid.cells[0].layers)} | grid.choices
    every["neuron"] = list(range(model.config.d_mlp))
    axes = grid.axes if "layer" in grid.axes else ("layer", *grid.axes)
    grid = replace(grid, axes=axes, choices=every)
    tokens = base.tokens.to(model.device)
    mask = base.seen.to(model.device).long() if base.padded else None
    bound = Measure(model, base, metric, finals).metric
    try:
        metric = differentiable_metric(metric, at_clean=finals[0] is base.final)
        changes = Estimator(model, tokens, mask, bound, grid, sources, "atp").terms()
    except checks.InputError as error:
        raise checks.InputError(
            f"top_neurons={count} chooses neurons by the metric's gradient. {error} Or choose them "
            "yourself, with neurons=[...]."
        ) from error
    size = changes.mean(-1).abs().movedim(axes.index("neuron"), 0).flatten(1).amax(1)
    size = checks.on_host(size)
    if size is None:  # a rehearsal, in which nothing has a value
        return list(range(count))
    if not bool(size.isfinite().all()):
        raise checks.InputError(
            f"top_neurons={count}: the gradient of {metric} is NaN or infinite at this run. Choose "
            "another metric, or the neurons yourself, with neurons=[...]."
        )
    return sorted(torch.argsort(size, descending=True, stable=True)[:count].tolist())


def in_words(count: int, d_mlp: int) -> str:
    """Say, for a result's metadata, how its neurons were chosen."""
    return f"{count} of {d_mlp}, by the largest change of the metric as AtP estimates it"
