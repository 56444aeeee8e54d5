"""Statistics of every tensor that a model computes on a prompt, gathered while it runs.

One run, in which each tensor is measured where it is made and then let go: what remains of a tensor
are a few numbers, whatever its size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from optlens.widgets.branches import lock_of

if TYPE_CHECKING:
    from optlens.model import OPTForCausalLM

MEASURES = ("mean", "std", "min", "max", "norm", "zeros", "masked")
BINS = 24
SHOWN = 6  # numbers of a tensor that are kept as they are


@dataclass(frozen=True)
class Measured:
    """Hold what is left of one tensor of one prompt.

    Attributes:
        shape: its sizes without the batch axis, padding left out.
        measures: `MEASURES`: mean, standard deviation (over all numbers), smallest, largest, L2
            norm, share of zeros, share of masked cells (-inf, which the others leave out).
        counts: a histogram of `BINS` bins from the smallest to the largest number.
        shown: the first `SHOWN` numbers at the last token, of head 0 where there are heads.
    """

    shape: tuple[int, ...]
    measures: np.ndarray
    counts: np.ndarray
    shown: np.ndarray


def measure(
    model: OPTForCausalLM,
    tokens: Tensor,
    real: Tensor,
    axes: dict[str, list[str]],
    modules: dict[str, nn.Module],
) -> list[dict[str, Measured]]:
    """Run a model once and measure what its hooks see.

    Args:
        model: the model; what hooks or interventions are attached acts, and is measured.
        tokens: token ids, `[batch, pos]`.
        real: True at real tokens, `[batch, pos]`.
        axes: for each name, the names of its axes without the batch: hook names, and those of
            `modules`.
        modules: modules whose output is measured, by the name to give it.

    Returns:
        For each prompt, in the order in which they were computed, name to what was measured.
    """
    found: list[dict[str, Measured]] = [{} for _ in tokens]
    columns = [row.nonzero().squeeze(1) for row in real]

    def keep(name: str, value: Tensor) -> None:
        for prompt, places in enumerate(columns):
            own = _without_padding(value[prompt], axes[name], places)
            found[prompt][name] = _measured(own, axes[name])

    hooks = [name for name in axes if name not in modules]
    mask = None if bool(real.all()) else real.long()
    with ExitStack() as stack:
        stack.enter_context(lock_of(model))
        stack.enter_context(model.in_eval_mode())
        stack.enter_context(torch.no_grad())
        for name, module in modules.items():
            handle = module.register_forward_hook(_output_to(keep, name))
            stack.callback(handle.remove)
        points = [model.hook_dict[name] for name in hooks]
        stack.enter_context(model.recorders(points, lambda value, hook: keep(hook.name, value)))
        model(tokens, attention_mask=mask, use_cache=False)
    return found


def _output_to(keep: Callable[[str, Tensor], None], name: str) -> Callable[..., None]:
    return lambda module, given, output: keep(name, output)


def _without_padding(value: Tensor, axes: list[str], places: Tensor) -> Tensor:
    for axis, name in enumerate(axes):
        if name in ("pos", "query", "key") and len(places) < value.shape[axis]:
            value = value.index_select(axis, places.to(value.device))
    return value


def _measured(value: Tensor, axes: list[str]) -> Measured:
    wide = value.detach().to(torch.promote_types(value.dtype, torch.float32))
    flat = wide.flatten()
    seen = flat[flat > -torch.inf] if axes[-1] == "key" else flat
    measures: list[Any] = [seen.mean(), seen.std(correction=0), seen.min(), seen.max()]
    measures += [torch.linalg.vector_norm(seen), (flat == 0).to(wide.dtype).mean()]
    measures.append(flat.new_tensor(1 - seen.numel() / flat.numel()))
    counts = torch.histc(seen, bins=BINS)  # between its smallest and its largest
    return Measured(
        tuple(value.shape),
        torch.stack(measures).cpu().numpy(),
        counts.cpu().numpy().astype(np.int32),
        _first_numbers(wide, axes).cpu().numpy(),
    )


def _first_numbers(value: Tensor, axes: list[str]) -> Tensor:
    """Return the first numbers at the last token."""
    axis = 0
    for name in axes:
        if name in ("pos", "query"):
            value = value.select(axis, -1)
        elif name == "head":
            value = value.select(axis, 0)
        else:
            axis += 1
    return value.flatten()[:SHOWN]
