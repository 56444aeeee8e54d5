"""Causal tracing: spoil the subject of a prompt with noise, then restore one state at a time.

The protocol of Meng et al. 2022 (arXiv 2202.05262): Gaussian noise is added to the embeddings of
the subject's tokens, which makes the model lose the answer; the state that brings it back when it
is restored to its clean value carries what is known about the subject. Zhang and Nanda 2023 (arXiv
2309.16042) advise a corrupt prompt with another subject instead, where there is one: noise may
throw the model off its usual paths. For that, take `patch_sweep`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optlens import checks
from optlens.attention_mask import real_tokens
from optlens.metric_targets import as_answer
from optlens.metrics import Metric, as_metric, prob
from optlens.patching.base_run import BaseRun, run_base, site_values
from optlens.patching.grid import make_grid
from optlens.patching.measure import AnyMetric
from optlens.patching.pairs import prompts_on_host, undisturbed
from optlens.patching.places import Positions, looked_up, places_of
from optlens.patching.plan import SweepPlan
from optlens.patching.result import PatchResult, make_labels, prompt_strings
from optlens.patching.sites import as_given, names_of
from optlens.patching.spans import Spans, positions_of
from optlens.patching.stream import SweepStream
from optlens.patching.sweep import Sweep
from optlens.selection import Selection

if TYPE_CHECKING:
    from optlens.inputs import Prompt
    from optlens.model import OPTForCausalLM

EMBEDDINGS_AT_ONCE = 4096


def causal_trace(
    model: OPTForCausalLM,
    prompt: Prompt,
    subject: Spans,
    metric: AnyMetric | None = None,
    site: str | Sequence[str] = "resid_post",
    over: str | Sequence[str] = ("layer", "pos"),
    window: int = 1,
    noise: float = 3.0,
    samples: int = 10,
    seed: int = 0,
    reference: Prompt | None = None,
    layers: Selection = None,
    heads: Selection = None,
    positions: Positions = None,
    memory_budget: int | None = None,
    progress: bool = True,
    dry_run: bool = False,
    stream: bool = False,
    resume: PatchResult | None = None,
    spans: Mapping[str, Any] | None = None,
    attention_mask: Tensor | None = None,
) -> PatchResult | SweepPlan | SweepStream:
    """Corrupt the subject's embeddings with noise, restore one place at a time, measure each.

    Args:
        model: The model.
        prompt: The prompt or prompts, up to the answer.
        subject: The tokens that get noise: a text such as "The Space Needle", positions, or a list
            with one of these for each prompt; see `optlens.patching.spans.positions_of`.
        metric: What to measure, as for `patch_sweep`; the probability of the token that the clean
            run predicts unless given.
        site: What is restored, as for `patch_sweep`: "resid_post" for single states, "mlp_out" or
            "attn_out" with a `window` for what sub-layers contribute; several give the axis
            "component".
        over: The axes, as for `patch_sweep`.
        window: Blocks restored at once, around the entry of the layer axis; the paper takes 10 of
            GPT-2 XL's 48 for MLPs and attention, 1 for states.
        noise: The noise's standard deviation as a multiple of that of the embeddings.
        samples: How often noise is drawn; the metric is the mean over samples.
        seed: Of the noise. A prompt gets the same noise in every patch, and whether it is traced
            alone or among others.
        reference: Texts of whose tokens the embeddings' standard deviation is taken, `</s>` left
            out (the paper takes the subjects of all its facts); the whole vocabulary unless given.
        layers: Blocks to restore, as for `patch_sweep`.
        heads: Heads, likewise.
        positions: Positions, likewise.
        memory_budget: As for `patch_sweep`.
        progress: As for `patch_sweep`.
        dry_run: As for `patch_sweep`.
        stream: As for `patch_sweep`.
        resume: As for `patch_sweep`.
        spans: Names for `positions`, as for `patch_sweep`.
        attention_mask: For padded token ids, on either side: 1 at real tokens, 0 at padding,
            `[prompts, pos]`. They are brought to the form of texts, padded on the left.

    Returns:
        The metric of every restored run, a mean over noise samples. `result.clean` is the run
        without noise, `result.corrupt` the one with noise and nothing restored:
        `result.values - result.corrupt` is the indirect effect, `result.normalized` the share of
        the total effect.

    Raises:
        InputError: If the subject is not found, or arguments do not fit together.
        MemoryError: If `memory_budget` is too small.

    Example:
        >>> import optlens
        >>> model = optlens.load()
        >>> prompt = "The capital of France is"
        >>> result = causal_trace(model, prompt, "France", samples=2, progress=False)
        >>> result.axes, result.labels["pos"][4]
        (('layer', 'pos'), '4:  France')
    """
    _check_noise(noise, samples)
    tokens, mask = prompts_on_host(model, prompt, attention_mask)
    real = real_tokens(tokens, mask)
    places = positions_of(model, tokens, real, subject, "subject")
    scale = noise * embedding_std(model, reference)
    added, first = _draw(places, real, model.config.d_model, scale, samples, seed)
    base, sources, clean_final = _runs(model, tokens, mask, added, samples, names_of(site))
    metric = _predicted(model, real, clean_final[::samples]) if metric is None else metric
    metric = as_metric(metric)
    metric.bind(model, tokens, mask)  # what is wrong with it is said of the prompts as given
    positions = places_of(model, tokens, real, positions, spans)
    grid = make_grid(model.config, site, over, real, layers, heads, positions, window=window)
    about = {
        "site": as_given(site),
        "window": window,
        "prompts": tokens.tolist(),
        "subject": places,
    }
    about |= looked_up(positions)
    about |= {"noise": noise, "noise_std": scale, "samples": samples, "seed": seed}
    grid = replace(grid, columns=grid.columns.repeat_interleave(samples, 0))
    finals = (clean_final, base.final)
    repeated = _for_each_sample(metric, samples)
    sweep = Sweep(model, base, sources, grid, repeated, finals, first, about, memory_budget)
    sweep.measure.name = str(metric)
    labels = make_labels(grid.choices, prompt_strings(model, tokens, real))
    resumed = _with_samples(resume, samples) if isinstance(resume, PatchResult) else resume
    shown = partial(_mean, samples=samples, labels=labels)
    return sweep.answer(dry_run, stream, progress, resumed, shown)


def embedding_std(model: OPTForCausalLM, reference: Prompt | None = None) -> float:
    """Compute the standard deviation of the entries of token embeddings, as at `hook_embed`.

    Args:
        model: The model.
        reference: Texts whose tokens count, `</s>` left out; the whole vocabulary unless given.

    Raises:
        InputError: If no token of the reference is left.

    Example:
        >>> import optlens
        >>> embedding_std(optlens.load()) > 0
        True
    """
    if reference is None:
        ids = torch.arange(model.config.vocab_size, device=model.device)
    else:
        tokens, mask = model.prepare_inputs(reference)
        counts = tokens != model.config.bos_token_id
        ids = tokens[counts if mask is None else counts & mask.bool().to(tokens.device)]
        if not len(ids):
            raise checks.InputError(
                f"reference={reference!r} has no token but </s>; give texts, such as subjects."
            )
    count, total, squares = 0, 0.0, 0.0
    with torch.no_grad():
        for part in ids.split(EMBEDDINGS_AT_ONCE):
            values = model.decoder.embed_tokens(part)
            if model.decoder.project_in is not None:
                values = model.decoder.project_in(values)
            values = values.double()
            count += values.numel()
            total += float(values.sum())
            squares += float(values.square().sum())
    return max(squares / count - (total / count) ** 2, 0.0) ** 0.5


# --------------------------------------------------------------------------------- the two runs


def _check_noise(noise: float, samples: int) -> None:
    if not noise > 0:
        raise checks.InputError(
            f"noise={noise}: give a positive multiple of the embeddings' standard deviation; the "
            "paper takes 3."
        )
    if samples < 1:
        raise checks.InputError(f"samples={samples}: noise is drawn at least once.")


def _draw(
    places: list[list[int]], real: Tensor, d_model: int, scale: float, samples: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Draw the noise; each prompt starts from the seed anew.

    Returns:
        What is added at `hook_embed`, `[prompts * samples, pos, d_model]`, the samples of a prompt
        side by side; and the first column that is changed, `[prompts * samples]`.
    """
    added = torch.zeros(len(real), samples, real.shape[1], d_model)
    first = []
    for row, numbers in enumerate(places):
        columns = real[row].cpu().nonzero().flatten()[numbers]
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(samples, len(numbers), d_model, generator=generator)
        added[row][:, columns] = scale * drawn
        first.append(int(columns[0]))
    return added.flatten(0, 1), torch.tensor(first).repeat_interleave(samples)


def _runs(
    model: OPTForCausalLM,
    tokens: Tensor,
    mask: Tensor | None,
    added: Tensor,
    samples: int,
    names: set[str],
) -> tuple[BaseRun, dict[str, list[Tensor]], Tensor]:
    """Run with noise, once for each sample, and without.

    Returns:
        The run with noise; the clean values, and the clean run's last residual stream, both
        repeated for each sample.
    """

    def repeated(value: Tensor) -> Tensor:
        """Give each sample its prompt's row; of a single prompt that takes no memory."""
        return value.unsqueeze(1).expand(-1, samples, *value.shape[1:]).flatten(0, 1)

    def spoil(embed: Tensor, hook) -> Tensor:
        return embed + added.to(embed)

    with undisturbed(model):
        clean, final = site_values(model, tokens, mask, names)
        with model.hooks([("hook_embed", spoil)]):
            mask = None if mask is None else repeated(mask)
            base = run_base(model, repeated(tokens), mask, names)
    sources = {name: [repeated(value) for value in layers] for name, layers in clean.items()}
    return base, sources, repeated(final)


# ---------------------------------------------------------------------------------- the metric


def _predicted(model: OPTForCausalLM, real: Tensor, final: Tensor) -> Metric:
    """Return the probability of the token that the clean run finds likeliest after each prompt."""
    last = real.shape[1] - 1 - real.flip(1).int().argmax(1)  # padding may be on the right
    with undisturbed(model):
        logits = model.unembed(final[torch.arange(len(final)), last].unsqueeze(1))
    answers = [as_answer(model, token) for token in logits.squeeze(1).argmax(-1).tolist()]
    return prob(answers[0] if len(answers) == 1 else answers)


def _for_each_sample(metric: Metric, samples: int) -> Metric:
    """Repeat answers that differ from prompt to prompt for each sample."""

    def repeated(answer):
        if not isinstance(answer, tuple):
            return answer
        return tuple(entry for entry in answer for _ in range(samples))

    return replace(metric, answer=repeated(metric.answer), wrong=repeated(metric.wrong))


# ---------------------------------------------------------------------------------- the result


def _mean(result: PatchResult, samples: int, labels: dict[str, list[str]]) -> PatchResult:
    """Average a result over the noise samples of each prompt."""

    def mean(values: Tensor) -> Tensor:
        return values.unflatten(-1, (-1, samples)).mean(-1)

    return replace(
        result,
        per_prompt=mean(result.per_prompt),
        clean_per_prompt=mean(result.clean_per_prompt),
        corrupt_per_prompt=mean(result.corrupt_per_prompt),
        labels=labels,
    )


def _with_samples(result: PatchResult, samples: int) -> PatchResult:
    """Undo `_mean` as far as a sweep needs it to go on: patches are done for all samples or none."""
    return replace(result, per_prompt=result.per_prompt.repeat_interleave(samples, -1))
