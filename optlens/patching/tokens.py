"""Which tokens of a prompt a metric rests on, by gradients at their embeddings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optlens import checks
from optlens.attention_mask import real_tokens
from optlens.logit_math import widened
from optlens.names import get_act_name
from optlens.patching.gradients import differentiable_metric, graph_run
from optlens.patching.measure import AnyMetric
from optlens.patching.pairs import paired_tokens, undisturbed
from optlens.patching.result import prompt_strings
from optlens.recording import fingerprint

if TYPE_CHECKING:
    from optlens.inputs import Prompt
    from optlens.model import OPTForCausalLM

METHODS = ("input_x_gradient", "integrated_gradients")


@dataclass(eq=False)
class TokenAttribution:
    """What each token contributes to a metric.

    Attributes:
        values: `[prompts, pos]`, in units of the metric; 0 at padding.
        metric: The metric of the prompts, `[prompts]`.
        baseline: The metric of the baselines, `[prompts]`.
        str_tokens: The text of each prompt's real tokens.
        metadata: What was done: method, steps, metric, prompts, model fingerprint.
    """

    values: Tensor
    metric: Tensor
    baseline: Tensor
    str_tokens: list[list[str]]
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def gap(self) -> Tensor:
        """What the values miss of `metric - baseline`, `[prompts]`.

        For integrated gradients it goes to zero as steps grow: they are complete. Of a callable
        that gives one number for all prompts, the values of all prompts add up to it together.
        """
        total = self.values.sum(-1)
        if self.metadata.get("shared"):
            total = total.sum().expand_as(total)
        return self.metric - self.baseline - total


def token_attribution(
    model: OPTForCausalLM,
    prompt: Prompt,
    metric: AnyMetric | None = None,
    method: str = "integrated_gradients",
    steps: int = 50,
    baseline: Prompt | None = None,
    attention_mask: Tensor | None = None,
) -> TokenAttribution:
    """Divide a metric among the tokens of a prompt.

    Args:
        model: The model.
        prompt: Text, a list of texts, or token ids.
        metric: One of `optlens.metrics` that has a gradient, or a function of logits
            `[prompts, pos, d_vocab]` that returns a scalar, or `[prompts]` of which each rests on
            the logits of its own prompt.
        method: "input_x_gradient" is the difference between a token's embedding and the baseline,
            times the metric's gradient at it. "integrated_gradients" (Sundararajan et al. 2017,
            arXiv 1703.01365) takes the mean gradient on the straight line between the two, so that
            the values add up to the difference in the metric.
        steps: Runs of integrated gradients, at the middles of as many equal pieces.
        baseline: As many prompts of the same lengths, whose embeddings are the baseline; zeros
            unless given. Positions keep their embeddings in either case.
        attention_mask: As for `patch_sweep`; `values` are then padded on the left.

    Returns:
        Values `[prompts, pos]` with the metric at prompt and baseline.

    Raises:
        InputError: If the metric has no gradient that says something, or prompts do not fit.

    Example:
        >>> import optlens
        >>> from optlens.metrics import logit_diff
        >>> model = optlens.load()
        >>> prompt = "While Mary and John were at the store, John gave a book to"
        >>> found = token_attribution(model, prompt, logit_diff(" Mary", " John"), steps=8)
        >>> found.values.shape[1] == len(found.str_tokens[0])
        True
    """
    if method not in METHODS:
        raise checks.InputError(f"method={method!r}: the methods are {', '.join(METHODS)}.")
    if steps < 1:
        raise checks.InputError(f"steps={steps}: the gradient is the mean of at least one run's.")
    integrated = method == "integrated_gradients"
    metric = differentiable_metric(metric, at_clean=not integrated)
    others = prompt if baseline is None else baseline
    (tokens, others), mask = paired_tokens(model, prompt, others, attention_mask)
    name = get_act_name("embed")
    with undisturbed(model):
        bound = metric.bind(model, tokens, mask)
        keep = {"attention_mask": mask, "logits_to_keep": bound.columns, "use_cache": False}
        logits, cache = model.run_with_cache(tokens, name, **keep)
        embed, start = cache[name], torch.zeros_like(cache[name])
        if baseline is not None:
            _, cache = model.run_with_cache(others, name, stop_at_layer=1, attention_mask=mask)
            start = cache[name]
        bound = bound.with_clean(logits) if bound.needs_clean else bound
        ends = [graph_run(model, tokens, mask, bound, [name], each) for each in (embed, start)]
        points = [(i + 0.5) / steps for i in range(steps)] if integrated else [1.0]
        gradient = widened(torch.zeros_like(embed))  # many small terms: half precision would not do
        for point in points:
            run = graph_run(model, tokens, mask, bound, [name], torch.lerp(start, embed, point))
            gradient.add_(run.gradients(run.total, [name])[name], alpha=1 / len(points))
        real = real_tokens(tokens, mask)
        values = ((embed - start) * gradient).sum(-1).masked_fill(~real, 0.0)
    about = {"method": method, "metric": str(metric), "tokens": tokens.tolist()}
    about |= {"steps": len(points), "baseline": None if baseline is None else others.tolist()}
    return TokenAttribution(
        values.cpu(),
        *(run.metric.detach().cpu() for run in ends),
        prompt_strings(model, tokens, real),
        about | {"shared": ends[0].shared, "model": fingerprint(model)},
    )
