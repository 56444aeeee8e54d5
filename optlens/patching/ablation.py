"""Ablation sweeps: overwrite one place at a time with zeros, means or another prompt's values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optlens import checks
from optlens.attention_mask import real_tokens
from optlens.interventions import Intervention
from optlens.patching.base_run import run_base, site_values
from optlens.patching.grid import axes_of, make_grid
from optlens.patching.measure import AnyMetric
from optlens.patching.pairs import prompts_on_host, undisturbed
from optlens.patching.places import Positions, looked_up, places_of
from optlens.patching.plan import SweepPlan
from optlens.patching.result import PatchResult
from optlens.patching.sites import as_given, names_of
from optlens.patching.standing import Standing
from optlens.patching.stream import SweepStream
from optlens.patching.sweep import Sweep
from optlens.patching.top_neurons import check_top, in_words, strongest_neurons
from optlens.selection import Selection

if TYPE_CHECKING:
    from optlens.inputs import Prompt
    from optlens.model import OPTForCausalLM

MODES = ("zero", "mean", "resample")


def ablate_sweep(
    model: OPTForCausalLM,
    prompts: Prompt,
    site: str | Sequence[str] = "z",
    over: str | Sequence[str] = ("layer", "head"),
    mode: str = "mean",
    reference: Prompt | None = None,
    per_position: bool = False,
    metric: AnyMetric | None = None,
    layers: Selection = None,
    heads: Selection = None,
    positions: Positions = None,
    neurons: Selection = None,
    top_neurons: int | None = None,
    window: int = 1,
    seed: int = 0,
    memory_budget: int | None = None,
    progress: bool = True,
    dry_run: bool = False,
    stream: bool = False,
    resume: PatchResult | None = None,
    interventions: Intervention | Iterable[Intervention] = (),
    spans: Mapping[str, Any] | None = None,
    attention_mask: Tensor | None = None,
) -> PatchResult | SweepPlan | SweepStream:
    """Ablate one place at a time and measure each.

    Args:
        model: The model.
        prompts: The prompt or prompts to run.
        site: As for `patch_sweep`.
        over: As for `patch_sweep`.
        mode: "zero"; "mean", the mean over a reference set; or "resample", the values of another
            prompt of the reference set, drawn by `seed`.
        reference: Prompts that the mean or the values are taken from. "resample" needs prompts of
            as many tokens as those that are run.
        per_position: Take the mean of each position by itself, over prompts of as many tokens as
            those that are run; otherwise one mean over all real positions, `</s>` included.
        metric: As for `patch_sweep`.
        layers: As for `patch_sweep`.
        heads: As for `patch_sweep`.
        positions: As for `patch_sweep`.
        neurons: As for `patch_sweep`.
        top_neurons: As for `patch_sweep`: the estimate is the metric's gradient, times what the
            ablation changes.
        window: As for `patch_sweep`.
        seed: For "resample": equal seeds pair equal prompts.
        memory_budget: As for `patch_sweep`.
        progress: As for `patch_sweep`.
        dry_run: As for `patch_sweep`.
        stream: As for `patch_sweep`.
        resume: As for `patch_sweep`.
        interventions: One or several of `optlens.interventions` that act on every run of the
            prompts, and where they meet an ablation before it. References are run without them, as
            those of `optlens.Ablate` are: each result is that of `model.intervene` with this list
            and an `Ablate` at its end.
        spans: Names for positions, as for `patch_sweep`.
        attention_mask: For padded token ids, on either side: 1 at real tokens, 0 at padding,
            `[prompts, pos]`. They are brought to the form of texts, padded on the left.

    Returns:
        The metric of every ablation; its `clean` is the run that nothing was done to (but the
        `interventions`), and it has no `corrupt`.

    Raises:
        InputError: If arguments do not fit together; "mean" and "resample" need a reference.
        MemoryError: If `memory_budget` is too small.

    Example:
        >>> ablate_sweep(model, prompts, mode="zero", metric=logit_diff(" Mary", " John"))  # doctest: +SKIP
    """
    _check_mode(mode, reference, per_position)
    check_top(top_neurons, neurons, axes_of(site, over), model.config.d_mlp)
    tokens, mask = prompts_on_host(model, prompts, attention_mask)
    names = names_of(site)
    if names & {"attn_scores"} and mode != "resample":
        raise checks.InputError(
            f"mode={mode!r} makes no sense for attn_scores, where masked keys are -inf; ablate "
            "'pattern' or 'z', or use interventions.Knockout."
        )
    others = None if reference is None else model.inputs_on_host(reference)
    with undisturbed(model):
        standing = Standing(model, interventions, spans)
        standing.check_site(site)
        with standing.at_work(tokens, mask, "prompts"):
            base = run_base(model, tokens, mask, names)
        sources = _sources(model, base, mode, others, per_position, seed, names)
    positions = places_of(model, tokens, base.seen, positions, spans)
    finals = base.final, None
    about = {"site": as_given(site), "mode": mode, "window": window, "prompts": tokens.tolist()}
    about |= {"per_position": per_position, "seed": seed if mode == "resample" else None}
    about |= looked_up(positions)
    if others is not None:
        about["reference"] = others[0].tolist()
    lay_out = partial(make_grid, model.config, site, over, base.seen, layers, heads, positions)
    if top_neurons is not None:
        grid = lay_out(neurons=[0], window=window)
        with undisturbed(model), standing.at_work(tokens, mask, "prompts"):
            neurons = strongest_neurons(model, base, sources, finals, metric, grid, top_neurons)
        about["top_neurons"] = in_words(top_neurons, model.config.d_mlp)
    grid = lay_out(neurons=neurons, window=window)
    sweep = Sweep(model, base, sources, grid, metric, finals, None, about, memory_budget, standing)
    return sweep.answer(dry_run, stream, progress, resume)


def _check_mode(mode: str, reference: Prompt | None, per_position: bool) -> None:
    if mode not in MODES:
        raise checks.InputError(f"mode={mode!r}; there are {', '.join(MODES)}.")
    if mode != "zero" and reference is None:
        raise checks.InputError(
            f"mode={mode!r} takes its values from a reference set: pass reference=[...], prompts of "
            "the same kind as those that are run."
        )
    if mode == "zero" and reference is not None:
        raise checks.InputError(
            "mode='zero' writes zeros and has no use for a reference; leave it out, or take "
            "mode='mean'."
        )
    if per_position and mode != "mean":
        raise checks.InputError(f"per_position goes with mode='mean', not {mode!r}.")


def _sources(
    model: OPTForCausalLM,
    base,
    mode: str,
    reference: tuple[Tensor, Tensor | None] | None,
    per_position: bool,
    seed: int,
    names: set[str],
) -> dict[str, list[Tensor]]:
    """Make what is written, for each site one tensor `[prompts, pos, ...]` a layer."""
    if mode == "zero":
        return {name: [torch.zeros_like(v) for v in base.values[name]] for name in names}
    tokens, mask = reference
    real = real_tokens(tokens, mask)
    square = bool(names & {"pattern", "attn_scores"})
    if mode == "resample" or per_position or square:
        lengths, wanted = real.sum(-1), base.seen.sum(-1)
        if int(lengths.min()) != int(lengths.max()) or bool((wanted != lengths[0]).any()):
            raise checks.InputError(
                f"The reference prompts have {sorted(set(lengths.tolist()))} tokens and the prompts "
                f"{sorted(set(wanted.tolist()))}: taken position by position, all must be equally "
                "long. Reword them, or use mode='mean' with per_position=False."
            )
    values, _ = site_values(model, tokens, mask, names)
    count = len(base.tokens)
    if mode == "resample":
        chosen = other_prompts(base.tokens, tokens, seed)
        return {name: [v[chosen] for v in group] for name, group in values.items()}
    sources: dict[str, list[Tensor]] = {}
    places = real.nonzero(as_tuple=True)
    for name, group in values.items():
        sources[name] = []
        for layer, value in enumerate(group):
            if per_position or square:
                mean = value.mean(0, keepdim=True)
            else:
                mean = value[tuple(at.to(value.device) for at in places)].mean(0)[None, None]
            sources[name].append(mean.expand(count, *base.values[name][layer].shape[1:]))
    return sources


def other_prompts(tokens: Tensor, reference: Tensor, seed: int) -> Tensor:
    """Draw for each prompt a reference prompt that is not the same."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for number, row in enumerate(tokens):
        others = (reference != row).any(-1).nonzero().flatten()
        if not len(others):
            raise checks.InputError(
                f"The reference set holds nothing but prompt {number} itself; resampling takes "
                "another prompt's values. Give other prompts."
            )
        chosen.append(others[torch.randint(len(others), (), generator=generator)])
    return torch.stack(chosen)
