"""Attribution patching: estimates of all patches of a sweep from two forward passes and a backward one.

To first order, a patch changes the metric by what it changes in the activation, times the metric's
gradient at that activation (Nanda 2023; Syed et al. 2023, arXiv 2310.10348). The estimate is good
where the change is small or the way to the output nearly linear, and misses what saturates. AtP*
(Kramár et al. 2024, arXiv 2403.00745) repairs two such misses: the softmax of attention
(`softmax_fix`), and direct and indirect effects that happen to cancel (GradDrop).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optlens import checks
from optlens.attention_mask import AttentionMask, real_tokens
from optlens.bound_metric import BoundMetric
from optlens.names import get_act_name
from optlens.patching import softmax_fix
from optlens.patching.base_run import ONCE, site_values
from optlens.patching.gradients import GraphRun, differentiable_metric, graph_run
from optlens.patching.grid import Grid, make_grid
from optlens.patching.measure import AnyMetric
from optlens.patching.pairs import check_undivided, denoises, paired_tokens, undisturbed
from optlens.patching.places import Positions, looked_up, places_of
from optlens.patching.result import PatchResult, paired_labels, token_labels
from optlens.patching.sites import Site, as_given, names_of, site_named
from optlens.recording import fingerprint
from optlens.selection import Selection

if TYPE_CHECKING:
    from optlens.inputs import Prompt
    from optlens.model import OPTForCausalLM

METHODS = ("atp", "atp+qk", "atp*")
_AXES = ("pos", "head", "key", "neuron")  # of one site's effects, after the prompts


def attribution_patch(
    model: OPTForCausalLM,
    clean: Prompt,
    corrupt: Prompt,
    site: str | Sequence[str] = "z",
    over: str | Sequence[str] = ("layer", "head"),
    metric: AnyMetric | None = None,
    method: str = "atp",
    direction: str = "denoise",
    layers: Selection = None,
    heads: Selection = None,
    positions: Positions = None,
    neurons: Selection = None,
    spans: Mapping[str, Any] | None = None,
    attention_mask: Tensor | None = None,
) -> PatchResult:
    """Estimate what `patch_sweep` would measure, by gradients.

    Args:
        model: The model.
        clean: The prompt, or prompts, with the answer that is asked for.
        corrupt: As many prompts, each of as many tokens as its clean one.
        site: As in `patch_sweep`.
        over: As in `patch_sweep`. A patch must write one layer: without "layer" among the axes,
            `layers` names one.
        metric: One of `optlens.metrics` that has a gradient, or a function of logits
            `[prompts, pos, d_vocab]` that returns a scalar or `[prompts]`.
        method: "atp" is the first-order term. "atp+qk" recomputes the softmax for patched queries
            and keys, and is the same at all other sites. "atp*" is that with GradDrop: for each
            block the term is computed anew with the gradient stopped at what the block adds, and
            their absolute values are averaged. That is a score to rank by, so as not to miss a
            part, and not an estimate of the patch; here it has the sign of the "atp+qk" term.
        direction: "denoise" writes clean values into the corrupt run; "noise" corrupt ones into
            the clean run. Gradients are taken at the run that is written into.
        layers: Blocks to take; all unless given.
        heads: Heads to take; needs "head" among the axes.
        positions: Positions to take, as for `patch_sweep`.
        neurons: Neurons to take; needs "neuron" among the axes.
        spans: Names for `positions`, as for `patch_sweep`.
        attention_mask: As for `patch_sweep`.

    Returns:
        Values that compare one to one with those of `patch_sweep`: the metric of the unpatched run
        plus the estimated change.

    Raises:
        InputError: If prompts, axes or metric do not fit together, a patch would write several
            layers at once, or the metric has no gradient that says something.

    Example:
        >>> import optlens
        >>> from optlens.metrics import logit_diff
        >>> model = optlens.load()
        >>> clean = "While Mary and John were at the store, John gave a book to"
        >>> corrupt = "While Mary and John were at the store, Mary gave a book to"
        >>> result = attribution_patch(model, clean, corrupt, metric=logit_diff(" Mary", " John"))
        >>> result.axes, len(result.values) == model.config.n_layers
        (('layer', 'head'), True)
    """
    check_undivided(model)
    denoise = denoises(direction)
    _check_method(method, model.config.n_layers)
    metric = differentiable_metric(metric, at_clean=not denoise)
    (clean_tokens, corrupt_tokens), mask = paired_tokens(model, clean, corrupt, attention_mask)
    base, source = (corrupt_tokens, clean_tokens) if denoise else (clean_tokens, corrupt_tokens)
    real = real_tokens(base, mask)
    positions = places_of(model, clean_tokens, real.cpu(), positions, spans)
    grid = make_grid(
        model.config, site, over, real.cpu(), layers, heads, positions, neurons, window=1
    )
    _check_one_layer(grid)
    with undisturbed(model):
        values, final = site_values(model, source, mask, names_of(site))
        bound = metric.bind(model, base, mask)
        rows = torch.arange(len(final), device=final.device)[:, None]
        logits = model.unembed(final[rows, bound.columns.to(final.device)])
        bound = bound.with_clean(logits) if bound.needs_clean else bound
        estimator = Estimator(model, base, mask, bound, grid, values, method)
        unpatched = estimator.run.metric.detach()
        terms = estimator.terms()
        ends = [bound(logits).cpu(), unpatched.cpu()]
    about = {
        "site": as_given(site),
        "direction": direction,
        "method": method,
        "metric": str(metric),
    }
    about |= looked_up(positions)
    about |= {"clean": clean_tokens.tolist(), "corrupt": corrupt_tokens.tolist()}
    return PatchResult(
        (unpatched + terms).cpu(),
        *(ends if denoise else ends[::-1]),
        grid.axes,
        paired_labels(model, grid.choices, clean_tokens, corrupt_tokens, real),
        grid.choices,
        about | {"model": fingerprint(model), "labels": token_labels(model, about)},
    )


def _check_method(method: str, n_layers: int) -> None:
    if method not in METHODS:
        raise checks.InputError(f"method={method!r}: the methods are {', '.join(METHODS)}.")
    if method == "atp*" and n_layers < 2:
        raise checks.InputError(
            "method='atp*' leaves out one block at a time, and this model has only one. Use "
            "'atp+qk', which is the same without that."
        )


def _check_one_layer(grid: Grid) -> None:
    several = next((cell.layers for cell in grid.cells if len(cell.layers) > 1), None)
    if several is not None:
        raise checks.InputError(
            f"A patch would write the layers {several[0]} to {several[-1]} at once. Later writes "
            "cut off what earlier ones pass on, which one gradient does not know. Add 'layer' to "
            "over=, name one layer in layers=, or run the patches with patch_sweep."
        )


class Estimator:
    """Estimates every patch of a grid from gradients of one run."""

    def __init__(
        self,
        model: OPTForCausalLM,
        tokens: Tensor,
        mask: Tensor | None,
        bound: BoundMetric,
        grid: Grid,
        sources: dict[str, list[Tensor]],
        method: str,
    ) -> None:
        """Make the base run; `sources` holds what is written, as `site_values` gives it."""
        self.grid, self.sources, self.bound = grid, sources, bound
        self.model, self.method, self.n_layers = model, method, model.config.n_layers
        self.scale = model.config.d_head**-0.5
        self.mask = AttentionMask(mask, *tokens.shape, tokens.shape[1], tokens.device)
        self.fixed = {"q", "k"} & set(sources) if method != "atp" else set()
        names = list(sources) + (["q", "k", "pattern"] if self.fixed else [])
        self.hooks = {
            name: [get_act_name(name, layer) for layer in range(self.n_layers)]
            if name not in ONCE
            else [get_act_name(name)]
            for name in names
        }
        needed = [hook for hooks in self.hooks.values() for hook in hooks]
        self.run: GraphRun = graph_run(
            model, tokens, mask, bound, needed, droppable=method == "atp*"
        )

    @torch.enable_grad()
    def terms(self) -> Tensor:
        """Estimate how each patch changes the metric, `[*axes, prompts]`."""
        metric = self.run.metric
        if self.run.shared:
            return self._effects(metric[0], together=True).expand(*self.grid.shape, len(metric))
        if not (self.bound.whole and self._mixes_prompts()):
            return self._effects(metric.sum())
        return torch.cat([self._effects(value, together=True) for value in metric], -1)

    def _mixes_prompts(self) -> bool:
        """Find out whether a callable's value of one prompt depends on the logits of others."""
        logits = self.run.logits.detach().requires_grad_()
        for number, value in enumerate(self.bound(logits)):
            (gradient,) = torch.autograd.grad(value, logits, retain_graph=True)
            gradient[number] = 0.0
            if gradient.any():
                return True
        return False

    def _effects(self, output: Tensor, together: bool = False) -> Tensor:
        """Estimate the change of one scalar, `[*axes, prompts]`; or `[*axes, 1]`, summed over them."""
        plain = self._first_order(output, None, together)
        if self.method != "atp*":
            return plain
        size = torch.zeros_like(plain)
        for layer in range(self.n_layers):
            size += self._first_order(output, layer, together).abs()
        return torch.where(plain < 0, -size, size)

    def _first_order(self, output: Tensor, dropped: int | None, together: bool) -> Tensor:
        needed = [hook for hooks in self.hooks.values() for hook in hooks]
        gradients = self.run.gradients(output, needed, dropped)
        components = self.grid.choices.get("component", [self.grid.cells[0].site.name])
        estimates = []
        for name in components:
            site = site_named(name)
            # own-block terms vanish for what a block adds, and not for the stream itself
            count = self.n_layers - (site.stream is not None)
            share = 1.0 if dropped is None else 1.0 / count
            estimates.append(share * self._site_estimates(site, gradients))
        stacked = torch.stack(estimates)  # [component, layer, prompt, *other axes]
        if together:
            stacked = stacked.sum(2, keepdim=True)
        given = ["component", "layer", "prompt", *(a for a in _AXES if a in self.grid.axes)]
        single = [i for i, axis in enumerate(given[:2]) if axis not in self.grid.axes]
        order = [given.index(axis) for axis in (*self.grid.axes, "prompt")]
        return stacked.permute(*order, *single).flatten(len(order) - 1)

    def _site_estimates(self, site: Site, gradients: dict[str, Tensor]) -> Tensor:
        """Estimate the patches of one site, `[layer, prompts, *axes but layer]`."""
        cells = (cell for cell in self.grid.cells if cell.site.name == site.name)
        layers = self.grid.choices.get("layer") or [next(cells).layers[0]]
        found = [self._products(site, layer, gradients) for layer in layers]
        return torch.stack([self._select(effects, axes) for effects, axes in found])

    def _products(
        self, site: Site, layer: int, gradients: dict[str, Tensor]
    ) -> tuple[Tensor, list[str]]:
        """Multiply differences and gradients of one layer, leaving out `d_head` and `d_model`.

        Returns:
            `[prompts, *axes]`, and the names of the axes.
        """
        name = site.name
        if name in self.fixed:
            q, k, pattern = (self.hooks[each][layer] for each in ("q", "k", "pattern"))
            fix = softmax_fix.query_effect
            if name == "k":
                single = "pos" in self.grid.axes
                fix = softmax_fix.single_key_effect if single else softmax_fix.all_keys_effect
            values = self.run.values
            effect = fix(
                self.sources[name][layer],
                values[q].detach(),
                values[k].detach(),
                gradients[pattern],
                self.mask,
                self.scale,
            )
            return effect, ["pos", "head"]
        hook = self.hooks[name][layer]
        base, gradient = self.run.values[hook].detach(), gradients[hook]
        source = self.sources[name][layer]
        if "query" in site.axes:
            base, gradient = base.transpose(1, 2), gradient.transpose(1, 2)
        # equal values may be minus infinity, or belong to padding
        product = ((source - base) * gradient).masked_fill(source == base, 0.0)
        if "query" in site.axes:
            return product, ["pos", "head", "key"]
        if "d_mlp" in site.axes:
            return product, ["pos", "neuron"]
        return product.sum(-1), ["pos", "head"] if "head" in site.axes else ["pos"]

    def _select(self, effects: Tensor, axes: list[str]) -> Tensor:
        """Take the chosen entries of those axes that are swept, and sum over the others."""
        for dim, axis in enumerate(axes, start=1):
            if axis not in self.grid.axes:
                effects = effects.sum(dim, keepdim=True)
            elif axis in ("pos", "key"):
                columns = self.grid.columns.to(effects.device)
                shape = [1] * effects.ndim
                shape[0], shape[dim] = columns.shape
                effects = effects.take_along_dim(columns.view(shape), dim)
            else:
                chosen = torch.tensor(self.grid.choices[axis], device=effects.device)
                effects = effects.index_select(dim, chosen)
        summed = [dim for dim, axis in enumerate(axes, start=1) if axis not in self.grid.axes]
        return effects.squeeze(summed) if summed else effects
