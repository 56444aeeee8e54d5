"""What a sweep keeps of the run that it patches, and of the run (or rule) that it patches from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from optlens import checks
from optlens.attention_mask import real_tokens
from optlens.names import get_act_name
from optlens.patching.sites import SITES

ONCE = ("embed", "pos_embed")
# Over so few tokens a run takes its time for reading the weights, so that two at once save one of them.
FEW_TOKENS = 32


@dataclass(eq=False)
class BaseRun:
    """The unpatched run, from which patched runs branch off.

    Attributes:
        tokens: Token ids, `[prompts, pos]`, on the CPU: from them it is planned what to run.
        seen: True at real tokens, `[prompts, pos]`, on the CPU.
        padded: Whether any token is padding.
        values: Short site name to one tensor for each layer, `[prompts, ...]` as in the table of
            hooks; `embed` has one entry.
        final: The residual stream after the last block, `[prompts, pos, d_model]`.
        together: Whether the run that patches take values from was part of this one.
    """

    tokens: Tensor
    seen: Tensor
    padded: bool
    values: dict[str, list[Tensor]]
    final: Tensor
    together: bool = False

    @cached_property
    def real(self) -> Tensor:
        """True at real tokens, `[prompts, pos]`, where the run ended."""
        return self.seen.to(self.final.device)

    @property
    def devices(self) -> set[torch.device]:
        """Where the blocks are."""
        return {value.device for value in self.values["resid_pre"]}


def site_values(
    model, tokens: Tensor, mask: Tensor | None, names: set[str]
) -> tuple[dict[str, list[Tensor]], Tensor]:
    """Run once and keep some sites of all layers.

    Args:
        model: The model.
        tokens: Token ids, `[prompts, pos]`.
        mask: The padding mask, or None.
        names: Short site names.

    Returns:
        The values, as in `BaseRun`, and the residual stream after the last block.
    """
    n_layers = model.config.n_layers
    hooks = {
        name: [get_act_name(name, None if name in ONCE else layer) for layer in range(n_layers)]
        for name in names
    }
    wanted = sorted({hook for group in hooks.values() for hook in group})
    with torch.no_grad():
        final, cache = model.run_with_cache(
            tokens,
            names_filter=wanted,
            stop_at_layer=n_layers,
            attention_mask=mask,
            use_cache=False,
        )
    kept = {}
    for name, group in hooks.items():
        values = [cache[hook] for hook in (group[:1] if name in ONCE else group)]
        # positions first; of scores and patterns these are the queries
        square = name in ("attn_scores", "pattern")
        kept[name] = [value.transpose(1, 2) for value in values] if square else values
    for name, layers in kept.items():
        for layer, value in enumerate(layers):
            finite = value if name != "attn_scores" else value.nan_to_num(neginf=0.0)
            checks.finite(finite, f"{name} of block {layer}")
    return kept, final


def run_base(model, tokens: Tensor, mask: Tensor | None, site_names: set[str]) -> BaseRun:
    """Make the run that is patched, keeping what patches at the given sites branch off from.

    Args:
        model: The model.
        tokens: Token ids, `[prompts, pos]`.
        mask: The padding mask, or None.
        site_names: Short names of the sites that will be patched.
    """
    tokens, mask = tokens.cpu(), None if mask is None else mask.cpu()
    values, final = site_values(model, tokens, mask, values_kept(site_names))
    return BaseRun(tokens, real_tokens(tokens, mask), mask is not None, values, final)


def runs_together(n_tokens: int, memory_budget: int | None) -> bool:
    """Tell whether a sweep makes its two runs in one: a short one may hold more for a moment.

    Args:
        n_tokens: Columns of all prompts of one run.
        memory_budget: What the sweep was given.
    """
    return memory_budget is None and n_tokens <= FEW_TOKENS


def both_runs(
    model,
    given: Tensor,
    patched: Tensor,
    mask: Tensor | None,
    site_names: set[str],
) -> tuple[dict[str, list[Tensor]], Tensor, BaseRun]:
    """Make the run that patches take values from and the one that is patched in one go.

    Args:
        model: The model, without interventions.
        given: Token ids of the first run, `[prompts, pos]`.
        patched: Token ids of the second, of the same shape.
        mask: The padding mask of both, or None.
        site_names: Short names of the sites that will be patched.

    Returns:
        Of the first run the values and the last residual stream, as `site_values` gives them; and
        the second.
    """
    masks = None if mask is None else torch.cat([mask, mask])
    both = run_base(model, torch.cat([given, patched]), masks, site_names)
    first, second = slice(len(given)), slice(len(given), None)
    sources, values = {}, {}
    for name in sorted(both.values):  # copies: of the first run most is not needed
        layers = both.values.pop(name)
        values[name] = [value[second].clone() for value in layers]
        if name in site_names:
            sources[name] = [value[first].clone() for value in layers]
    halves = (both.tokens[second], both.seen[second], both.padded, values, both.final[second])
    base = BaseRun(*halves, together=True)
    return sources, both.final[first], base


def values_kept(site_names: set[str]) -> set[str]:
    """Return the short names of what is kept of the run that is patched.

    Args:
        site_names: Short names of the sites that will be patched.
    """
    names = {"resid_pre", "q", "k", "v", *site_names}
    names |= {SITES[name].stream for name in site_names} - {None}
    if "embed" in site_names:
        names.add("pos_embed")
    return names
