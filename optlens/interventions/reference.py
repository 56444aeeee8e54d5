"""Runs of the unedited model on reference prompts, and their means.

Interventions of one list that take the same from the same prompts share a run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optlens import checks
from optlens.interventions.address import Address
from optlens.interventions.held import HeldRun
from optlens.interventions.intervention import Intervention, Prompts
from optlens.interventions.kinds import Ablate, Freeze

if TYPE_CHECKING:
    from optlens.base import OPTBase

# How many tokens of reference prompts are run at once.
CHUNK_TOKENS = 4096


class References:
    """What a list of interventions takes from reference prompts; runs are made when asked for."""

    def __init__(self, model: OPTBase, interventions: Iterable[Intervention]) -> None:
        """Find out which hooks are asked of which prompts.

        Args:
            model: The model.
            interventions: Those whose references will be asked for.
        """
        self.model = model
        self._hooks: dict[Any, set[str]] = defaultdict(set)
        self._made: dict[Any, Any] = {}
        for each in interventions:
            prompts, function = None, reference_run
            if isinstance(each, Ablate):
                prompts = each.reference
                if each.mode == "mean":
                    function = mean_of_positions if each.per_position else mean_over_all
            elif isinstance(each, Freeze) and not isinstance(each.source, HeldRun):
                prompts = each.source
            if prompts is not None:
                self._hooks[function, _key(prompts)].update(each.address.hooks(model.config))

    def run(self, prompts: Prompts) -> tuple[HeldRun, Tensor]:
        """Return `reference_run` of the prompts, with all hooks that are asked of them."""
        return self._of(reference_run, prompts)

    def mean_of_positions(self, prompts: Prompts) -> HeldRun:
        """Return `mean_of_positions` of the prompts, with all hooks that are asked of them."""
        return self._of(mean_of_positions, prompts)

    def mean_over_all(self, prompts: Prompts, address: Address) -> dict[str, Tensor]:
        """Return the means of what is addressed, without batch and pos; see `mean_over_all`."""
        means = self._of(mean_over_all, prompts)
        means = {hook: means[hook] for hook in address.hooks(self.model.config)}
        narrowed = address.chosen(self.model.config)
        if narrowed is None:
            return means
        axis, indices = narrowed  # batch and pos are gone
        return {
            hook: mean.index_select(axis - 2, torch.tensor(indices, device=mean.device))
            for hook, mean in means.items()
        }

    def _of(self, function: Any, prompts: Prompts) -> Any:
        key = function, _key(prompts)
        if key not in self._made:
            self._made[key] = function(self.model, prompts, sorted(self._hooks[key]))
        return self._made[key]


def _key(prompts: Prompts) -> Any:
    """Return something hashable that equal prompts have in common."""
    if isinstance(prompts, Tensor):
        return tuple(prompts.shape), tuple(prompts.flatten().tolist())
    return prompts


def reference_run(model: OPTBase, prompts: Prompts, hooks: list[str]) -> tuple[HeldRun, Tensor]:
    """Run the unedited model on prompts and keep some hooks.

    Returns:
        The activations, and the token ids `[prompt, pos]`.
    """
    tokens, mask = _tokens(model, prompts)
    chunks = list(_chunks(model, tokens, mask, hooks))
    values = {hook: torch.cat([chunk[hook] for chunk, _ in chunks]) for hook in chunks[0][0]}
    return HeldRun(values, torch.cat([real for _, real in chunks])), tokens


def mean_over_all(model: OPTBase, prompts: Prompts, hooks: list[str]) -> dict[str, Tensor]:
    """Return each hook's mean over all prompts and their real positions, without batch and pos.

    Sums are in float64.
    """
    tokens, mask = _tokens(model, prompts)
    sums: dict[str, Tensor] = {}
    count = 0
    for values, real in _chunks(model, tokens, mask, hooks):
        count += int(real.sum())
        places = real.nonzero(as_tuple=True)  # found here: no device is asked how many there are
        for hook, value in values.items():
            total = value[tuple(at.to(value.device) for at in places)].double().sum(0)
            sums[hook] = sums.get(hook, 0) + total
    return {hook: total / count for hook, total in sums.items()}


def mean_of_positions(model: OPTBase, prompts: Prompts, hooks: list[str]) -> HeldRun:
    """Return each hook's mean over prompts of one length, as a run of one prompt.

    Raises:
        InputError: If the prompts have different lengths.
    """
    tokens, mask = _tokens(model, prompts)
    if mask is not None:
        lengths = sorted(set(mask.sum(-1).tolist()))
        raise checks.InputError(
            f"per_position=True needs reference prompts of one length, got {lengths[0]} to "
            f"{lengths[-1]} tokens; cut them, or take the mean over positions."
        )
    sums: dict[str, Tensor] = {}
    for values, _ in _chunks(model, tokens, mask, hooks):
        for hook, value in values.items():
            sums[hook] = sums.get(hook, 0) + value.double().sum(0, keepdim=True)
    means = {hook: total / len(tokens) for hook, total in sums.items()}
    return HeldRun(means, torch.ones(1, tokens.shape[1], dtype=torch.bool))


def _tokens(model: OPTBase, prompts: Prompts) -> tuple[Tensor, Tensor | None]:
    given = prompts if isinstance(prompts, Tensor) else list(prompts)
    return model.inputs_on_host(given)


def _chunks(
    model: OPTBase, tokens: Tensor, mask: Tensor | None, hooks: list[str]
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Run prompts a few at a time; yield the values at hooks, and where real tokens are (CPU)."""
    size = max(1, CHUNK_TOKENS // tokens.shape[1])
    layers = [int(hook.split(".")[1]) for hook in hooks if hook.startswith("blocks.")]
    for start in range(0, len(tokens), size):
        part = slice(start, start + size)
        real = torch.ones_like(tokens[part]) if mask is None else mask[part]
        with torch.no_grad(), unattended(model):
            _, cache = model.run_with_cache(
                tokens[part],
                names_filter=hooks,
                stop_at_layer=max(layers, default=0) + 1,
                attention_mask=None if mask is None else mask[part],
                use_cache=False,
            )
        yield dict(cache), real.bool()


@contextmanager
def unattended(model: OPTBase) -> Iterator[None]:
    """Take every listener off for a while: a run inside is edited by nobody, and seen by nobody."""
    kept = []
    for point in model.hook_dict.values():
        for listeners in (point.editors, point.recorders, point.gradient_hooks):
            if listeners:
                kept.append((point, listeners, list(listeners)))
                listeners.clear()
                point.refresh()
    try:
        yield
    finally:
        for point, listeners, entries in kept:
            listeners[:] = entries
            point.refresh()
