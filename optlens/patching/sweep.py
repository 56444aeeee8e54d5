"""A sweep: many patches of one base run, each measured, equal to one forward pass per patch.

`patch_sweep` moves values between a clean and a corrupt run; `ablate_sweep` (in `ablation`)
overwrites them with zeros, means or another prompt's values. Both make a `Sweep`, which knows the
base run, what is written where, and what is measured; `stream` carries it out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optlens import checks
from optlens.interventions import Intervention
from optlens.patching.base_run import BaseRun, both_runs, run_base, runs_together, site_values
from optlens.patching.budget import bytes_of, compiled_bytes, portion_budget
from optlens.patching.grid import Grid, axes_of, make_grid
from optlens.patching.measure import AnyMetric, Measure
from optlens.patching.pairs import denoises, paired_on_host, undisturbed
from optlens.patching.places import Positions, looked_up, places_of
from optlens.patching.plan import SweepPlan, chunks_of, patches_of, plan_of
from optlens.patching.result import (
    PatchResult,
    make_labels,
    paired_labels,
    prompt_strings,
    token_labels,
)
from optlens.patching.rows import rows_of
from optlens.patching.sites import as_given, names_of
from optlens.patching.standing import Standing
from optlens.patching.stream import SweepStream, run_to_end
from optlens.patching.top_neurons import check_top, in_words, strongest_neurons
from optlens.patching.wave_bytes import portion_bytes, unpatched_bytes
from optlens.recording import fingerprint
from optlens.selection import Selection

if TYPE_CHECKING:
    from optlens.inputs import Prompt
    from optlens.model import OPTForCausalLM


def patch_sweep(
    model: OPTForCausalLM,
    clean: Prompt,
    corrupt: Prompt,
    site: str | Sequence[str] = "resid_pre",
    over: str | Sequence[str] = ("layer", "pos"),
    metric: AnyMetric | None = None,
    direction: str = "denoise",
    layers: Selection = None,
    heads: Selection = None,
    positions: Positions = None,
    neurons: Selection = None,
    top_neurons: int | None = None,
    window: int = 1,
    memory_budget: int | None = None,
    progress: bool = True,
    dry_run: bool = False,
    stream: bool = False,
    resume: PatchResult | None = None,
    interventions: Intervention | Iterable[Intervention] = (),
    spans: Mapping[str, Any] | None = None,
    attention_mask: Tensor | None = None,
) -> PatchResult | SweepPlan | SweepStream:
    """Patch values of one run into another, one place at a time, and measure each.

    Args:
        model: The model.
        clean: The prompt, or prompts, with the answer that is asked for.
        corrupt: As many prompts, each of as many tokens as its clean one.
        site: What is patched: embed, resid_pre, resid_mid, resid_post, attn_out, mlp_out, q, k, v,
            z, pattern, attn_scores, result, mlp_pre, mlp_post; or several, as the axis "component".
        over: The axes of the result, of "layer", "pos", "head", "neuron", "key" (source position of
            pattern and scores) and "component". What is no axis is written whole.
        metric: One of `optlens.metrics`, or a function of one patch's logits
            `[prompts, pos, d_vocab]` that returns a scalar or `[prompts]`.
        direction: "denoise" writes clean values into the corrupt run; "noise" corrupt ones into
            the clean run.
        layers: Blocks to patch; all of them unless given.
        heads: Heads likewise.
        positions: Positions likewise, counted over each prompt's real tokens; or a token's text
            such as " John", `(" John", 1)` for its second place, names of `spans`, and lists of
            these. Texts are looked up in the clean prompts.
        neurons: Neurons of the MLP likewise.
        top_neurons: Sweep only so many neurons, the same in every layer: those whose effect is
            estimated largest at any of the layers and positions that are swept (`"atp"` of
            `attribution_patch`). Takes a backward pass, whose memory is not in `memory_budget`, and
            a metric with a gradient.
        window: Blocks written by one patch, around the entry of the layer axis.
        memory_budget: Bytes that the sweep may take beside the weights; half of what is free
            unless given.
        progress: Show a progress bar.
        dry_run: Return a `SweepPlan` instead: what would be computed.
        stream: Return a `SweepStream` instead, an iterator: the result after each portion of
            patches, always the same object, filled further and further. `PatchingView` shows one
            filling in.
        resume: A result of the same sweep that was cut short, to be completed.
        interventions: One or several of `optlens.interventions` that act on every run: the clean
            one, the corrupt one and each patched one. Positions in them are looked up in the
            clean and in the corrupt prompts. Where one meets a patch it acts first, and the patch
            overwrites it; what is patched in is the source run's value after it.
        spans: Names for positions, in `positions` and `interventions`, as `model.intervene` takes
            them: one for all prompts, or a list with an entry for each.
        attention_mask: For padded token ids, on either side: 1 at real tokens, 0 at padding,
            `[prompts, pos]`, for both prompts. They are brought to the form of texts, padded on the left.

    Returns:
        The metric of every patch; under `interventions` its ends, `clean` and `corrupt`, are runs
        under them too. A sweep that is interrupted from the keyboard returns what was
        done by then, with NaN elsewhere and `complete` False.

    Raises:
        InputError: If prompts, axes or metric do not fit together.
        MemoryError: If `memory_budget` is too small for the two runs and one patch.

    Example:
        >>> result = patch_sweep(model, clean, corrupt, metric=logit_diff(" Mary", " John"))  # doctest: +SKIP
    """
    denoise = denoises(direction)
    check_top(top_neurons, neurons, axes_of(site, over), model.config.d_mlp)
    (clean_tokens, corrupt_tokens), mask = paired_on_host(model, clean, corrupt, attention_mask)
    names = names_of(site)
    ends = [(clean_tokens, "clean prompts"), (corrupt_tokens, "corrupt prompts")]
    (given, from_where), (patched, where) = ends if denoise else ends[::-1]
    with undisturbed(model):
        standing = Standing(model, interventions, spans)
        standing.check_site(site)
        if not standing and runs_together(given.numel(), memory_budget):
            sources, source_final, base = both_runs(model, given, patched, mask, names)
        else:
            with standing.at_work(given, mask, from_where):
                sources, source_final = site_values(model, given, mask, names)
            with standing.at_work(patched, mask, where):
                base = run_base(model, patched, mask, names)
    finals = (source_final, base.final) if denoise else (base.final, source_final)
    differ = clean_tokens != corrupt_tokens
    first_difference = torch.where(differ.any(-1), differ.int().argmax(-1), differ.shape[1])
    about = {"site": as_given(site), "direction": direction, "window": window}
    about |= {"clean": clean_tokens.tolist(), "corrupt": corrupt_tokens.tolist()}
    positions = places_of(model, clean_tokens, base.seen, positions, spans)
    about |= looked_up(positions)
    lay_out = partial(make_grid, model.config, site, over, base.seen, layers, heads, positions)
    if top_neurons is not None:
        grid = lay_out(neurons=[0], window=window)
        with undisturbed(model), standing.at_work(patched, mask, where):
            neurons = strongest_neurons(model, base, sources, finals, metric, grid, top_neurons)
        about["top_neurons"] = in_words(top_neurons, model.config.d_mlp)
    grid = lay_out(neurons=neurons, window=window)
    equal_before = None if standing.by_tokens else first_difference
    sweep = Sweep(
        model, base, sources, grid, metric, finals, equal_before, about, memory_budget, standing
    )
    return sweep.answer(dry_run, stream, progress, resume)


class Sweep:
    """A sweep that is laid out and ready to run.

    Attributes:
        grid: The patches.
        rows: The runs that they need.
        patches: The same by patch, with the bytes that each takes.
        budget: Bytes that one portion may take.
        chunks: The same in portions.
        bytes: Memory for the tensors of the recorded runs and of the largest portion.
        room: The same with gaps in the heap, as portions are bounded by.
    """

    def __init__(
        self,
        model: OPTForCausalLM,
        base: BaseRun,
        sources: dict[str, list[Tensor]],
        grid: Grid,
        metric: AnyMetric | None,
        finals: tuple[Tensor, Tensor | None],
        equal_before: Tensor | None,
        about: dict[str, Any],
        memory_budget: int | None,
        standing: Standing | None = None,
    ) -> None:
        """Find out which runs are needed, and divide them into portions.

        Args:
            model: The model.
            base: The unpatched run.
            sources: What patches write, for each site one tensor `[prompts, pos, ...]` a layer.
            grid: The patches.
            metric: What to measure.
            finals: The last residual streams of the clean and the corrupt run; None where there is
                no corrupt one.
            equal_before: The first column in which the prompts differ, `[prompts]`, or None.
            about: Facts for the result's metadata.
            memory_budget: Bytes for recorded values and one portion, or None.
            standing: Interventions under which the runs were made and patches are to be, if any.
        """
        self.model, self.base, self.sources, self.grid = model, base, sources, grid
        self.about, self.is_bounded = about, memory_budget is not None
        self.standing, more = standing or None, 0
        held = {"finals": [final for final in finals if final is not None]}
        if self.standing is not None:
            self.about = about | {"interventions": standing.about}
            more = standing.numbers_per_token(base.tokens.shape[1])
            held["interventions"] = standing.held()
        with undisturbed(model):
            self.measure = Measure(model, base, metric, finals)
        self.rows = rows_of(grid, base, sources, self.measure.metric.columns, equal_before)
        length, recorded = base.tokens.shape[1], bytes_of(base.values, sources, held)
        itemsize = base.final.element_size()
        patches = patches_of(self.rows, model.config, length, itemsize, more)
        largest = max((size for _, size in patches), default=0)
        compiled = compiled_bytes(model.config)
        budget = portion_budget(memory_budget, recorded, compiled, largest, base.devices, "patch")
        portions = list(chunks_of(patches, length, budget))
        self.patches, self.budget = patches, budget
        self.chunks = [rows for rows, _ in portions]
        self.room = recorded + max((size for _, size in portions), default=0)
        reads = self.measure.reads.shape[1]
        about_runs = (model.config, length, itemsize, reads, more)
        together = bytes_of(base.values) - bytes_of(sources) if base.together else None
        unpatched = unpatched_bytes(model.config, len(base.tokens), length, itemsize, together)
        self.bytes = recorded + max(unpatched, portion_bytes(portions, *about_runs))

    @cached_property
    def plan(self) -> SweepPlan:
        """What will be computed."""
        return plan_of(
            self.rows,
            len(self.chunks),
            len(self.grid.cells) * len(self.base.tokens),
            self.model.config,
            self.base.tokens.shape[1],
            self.measure.reads.shape[1],
            self.bytes,
            0 if self.standing is None else len(self.standing.about),
        )

    def answer(
        self,
        dry_run: bool,
        stream: bool,
        progress: bool,
        resume: PatchResult | None,
        shown: Callable[[PatchResult], PatchResult] | None = None,
    ) -> PatchResult | SweepPlan | SweepStream:
        """Return what was asked for: the plan, the running sweep, or the whole result.

        Args:
            dry_run: Return the plan.
            stream: Return the running sweep.
            progress: Show a progress bar.
            resume: A result of the same sweep that was cut short.
            shown: Turns what the sweep finds into what its user gets, if that is not the same.
        """
        if dry_run:
            return self.plan
        running = SweepStream(self, resume, shown)
        return running if stream else run_to_end(running, progress)

    def empty_result(self, resume: PatchResult | None) -> PatchResult:
        """Make a result in which the patches that need no run are already answered."""
        clean, corrupt = self.measure.ends
        if corrupt is None:
            corrupt = torch.full_like(clean, torch.nan)
        per_prompt = self.measure.unpatched.expand(len(self.grid.cells), -1).clone()
        undefined = per_prompt.isnan().any(-1)
        for row in self.rows:
            per_prompt[row.cell.index, slice(None) if self.measure.metric.whole else row.prompt] = (
                torch.nan
            )
        undefined[[row.cell.index for row in self.rows]] = False
        about = self.about | {"metric": self.measure.name, "model": fingerprint(self.model)}
        if "layer" not in self.grid.axes:
            about["layers"] = list(self.grid.cells[0].layers)
        elif about["window"] > 1:
            about["blocks"] = self.model.config.n_layers  # a window ends where the model does
        result = PatchResult(
            per_prompt.view(*self.grid.shape, -1),
            clean,
            corrupt,
            self.grid.axes,
            self._labels(),
            self.grid.choices,
            about | {"labels": token_labels(self.model, about)},
            undefined.view(self.grid.shape),
        )
        if resume is not None:
            self._take_over(result, resume)
        return result

    def _take_over(self, result: PatchResult, resume: PatchResult) -> None:
        """Put what an earlier result of the same sweep knows into an empty one."""
        if not isinstance(resume, PatchResult):
            raise checks.InputError(
                f"resume={resume!r} is a {type(resume).__name__}; give the result itself that a "
                "sweep returned. One that was saved is read by optlens.PatchResult.load(path)."
            )
        same = resume.metadata == result.metadata and resume.choices == result.choices
        if not same or resume.axes != result.axes:
            raise checks.InputError(
                f"resume={resume!r} is a result of another sweep: model, prompts, site, axes and "
                "metric must be the same."
            )
        known = ~resume.missing
        result.per_prompt[known] = resume.per_prompt[known].to(result.per_prompt)
        result.undefined[known] = resume.per_prompt[known].isnan().any(-1)

    def _labels(self) -> dict[str, list[str]]:
        """Name the entries of the axes, positions by the tokens of both prompts if there are two."""
        model, real = self.model, self.base.seen
        if "corrupt" in self.about:
            pair = (torch.tensor(self.about[name]) for name in ("clean", "corrupt"))
            return paired_labels(model, self.grid.choices, *pair, real)
        return make_labels(self.grid.choices, prompt_strings(model, self.base.tokens, real))
