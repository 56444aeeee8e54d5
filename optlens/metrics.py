"""Metrics: one number for each prompt that says how well a run answers.

A `Metric` is plain data: which number, of which tokens, at which position. `bind` joins it to a batch of
prompts and tells what has to be computed (`columns`, `token_ids`), so that a sweep need not compute any
other logits; the `BoundMetric` then turns logits into numbers. Everything is in nats, in float32 at least.

| metric | meaning |
|---|---|
| `logit_diff(answer, wrong)` | mean logit of the answers minus that of the wrong ones |
| `logit(answer)` | mean logit of the answers |
| `prob(answer)`, `log_prob(answer)` | their total probability, or its logarithm |
| `prob_diff(answer, wrong)` | total probability of the answers minus that of the wrong ones |
| `rank(answer)` | how many tokens are likelier than the likeliest answer; 0 is the top |
| `kl()` | KL(p_clean, p): how far the distribution has moved from the clean run's |
| `entropy()` | of the whole distribution |
| `cross_entropy()` | mean next-token loss of each prompt, over its real tokens |

The answer is one token, or several that are all acceptable. The logit difference is linear in the logits
and the usual choice for patching: probabilities saturate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optlens import checks
from optlens import metric_targets as targets_of
from optlens.attention_mask import real_tokens
from optlens.bound_metric import LINEAR, BoundMetric
from optlens.logit_math import normalized
from optlens.metric_targets import Answer, FrozenAnswer

if TYPE_CHECKING:
    from optlens.base import OPTBase
    from optlens.inputs import Prompt

__all__ = [
    "BoundMetric",
    "Metric",
    "as_metric",
    "cross_entropy",
    "entropy",
    "kl",
    "log_prob",
    "logit",
    "logit_diff",
    "normalized",
    "prob",
    "prob_diff",
    "rank",
]


@dataclass(frozen=True, repr=False)
class Metric:
    """What to compute of a run; made by the functions of this module.

    Equal metrics compare equal, and `repr` shows the call that makes one.

    Attributes:
        name: The function that made it; "custom" for a callable.
        answer: The right token or tokens: text, id, or a tuple with an entry for each prompt.
        wrong: The wrong ones, likewise.
        pos: At which token the prediction is read, counted over each prompt's real tokens (`</s>`
            is 0), from the end if negative. None for `cross_entropy` and callables, which read all.
        function: The callable of a "custom" metric.
    """

    name: str
    answer: FrozenAnswer | None = None
    wrong: FrozenAnswer | None = None
    pos: int | None = None
    function: Callable[[Tensor], Any] | None = None

    def __repr__(self) -> str:
        if self.function is not None:
            return f"custom({getattr(self.function, '__name__', self.function)})"
        parts = [targets_of.shown(part) for part in (self.answer, self.wrong) if part is not None]
        parts += [] if self.pos in (None, -1) else [f"pos={self.pos}"]
        return f"{self.name}({', '.join(parts)})"

    @property
    def needs_clean(self) -> bool:
        """Whether it compares with the logits of a clean run."""
        return self.name == "kl"

    @property
    def whole(self) -> bool:
        """Whether it is a plain callable, which gets the logits of all positions and prompts."""
        return self.function is not None

    @property
    def differentiable(self) -> bool:
        """Whether a gradient through it says anything; only a rank has none."""
        return self.name != "rank"

    def bind(
        self, model: OPTBase, tokens: Tensor | Prompt, mask: Tensor | None = None
    ) -> BoundMetric:
        """Join the metric to a batch of prompts.

        Args:
            model: The model, for its tokenizer and vocabulary; it is not run.
            tokens: Token ids `[prompts, pos]`; or text or a list of texts.
            mask: 1 at real tokens and 0 at padding, `[prompts, pos]`; None if nothing is padded.

        Raises:
            InputError: If an answer is not one token (its pieces are shown) or out of range, there
                are not as many answers as prompts, or a prompt has no token at `pos`.
        """
        tokens, mask = model.inputs_on_host(tokens, mask)
        real = real_tokens(tokens, mask)
        bound = BoundMetric(self, torch.empty(0), model.config.vocab_size)
        if self.whole:
            columns = torch.arange(tokens.shape[1]).expand(tokens.shape[0], -1).clone()
            return replace(bound, columns=columns)
        if self.name == "cross_entropy":
            columns, targets = targets_of.next_token_columns(tokens, real)
            return replace(bound, columns=columns, targets=targets)
        bound = replace(bound, columns=targets_of.columns_at(real, self.pos))
        return bound if self.answer is None else self._bind_answers(bound, model)

    def _bind_answers(self, bound: BoundMetric, model: OPTBase) -> BoundMetric:
        n_prompts = bound.columns.shape[0]
        right = targets_of.answer_ids(self.answer, f"{self.name}: answer", model, n_prompts)
        ids, valid = targets_of.padded_ids(right)
        weights = valid / valid.sum(-1, keepdim=True, dtype=torch.float64)
        sign = valid.double()
        if self.wrong is not None:
            wrong = targets_of.answer_ids(self.wrong, f"{self.name}: wrong", model, n_prompts)
            targets_of.check_disjoint(right, wrong, self.name, model)
            wrong_ids, wrong_valid = targets_of.padded_ids(wrong)
            ids = torch.cat([ids, wrong_ids], -1)
            mean = wrong_valid / wrong_valid.sum(-1, keepdim=True, dtype=torch.float64)
            weights = torch.cat([weights, -mean], -1)
            sign = torch.cat([sign, -wrong_valid.double()], -1)
        return replace(bound, answers=ids, weights=weights if self.name in LINEAR else sign)

    @torch.no_grad()
    def of(
        self,
        model: OPTBase,
        prompt: Prompt,
        attention_mask: Tensor | None = None,
        clean: Prompt | None = None,
    ) -> Tensor:
        """Run the model once and compute the metric, without gradients.

        Args:
            model: The model.
            prompt: Text, a list of texts, or token ids.
            attention_mask: For padded token ids.
            clean: For `kl`: as many prompts, whose runs are the reference.

        Returns:
            One number for each prompt, `[prompts]`.

        Raises:
            InputError: As `bind`; or if `kl` has no `clean`.

        Example:
            >>> import optlens
            >>> model = optlens.load()
            >>> prompt = "While Mary and John were at the store, John gave a book to"
            >>> bool(logit_diff(" Mary", " John").of(model, prompt) > 0)
            True
        """
        tokens, mask = model.prepare_inputs(prompt, attention_mask)
        bound = self.bind(model, tokens, mask)
        if bound.needs_clean:
            if clean is None:
                raise checks.InputError(
                    "kl compares with a clean run: pass clean=, or use "
                    "bind(model, tokens).with_clean(logits)."
                )
            clean_tokens, clean_mask = model.prepare_inputs(clean)
            at = self.bind(model, clean_tokens, clean_mask).columns
            bound = bound.with_clean(_logits_at(model, clean_tokens, clean_mask, at))
        return bound(_logits_at(model, tokens, mask, bound.columns))


def _logits_at(model: OPTBase, tokens: Tensor, mask: Tensor | None, columns: Tensor) -> Tensor:
    """Run and return the logits at some columns, `[prompts, n_read, d_vocab]`."""
    output = model(tokens, attention_mask=mask, use_cache=False, logits_to_keep=columns)
    return output.logits


def _metric(name: str, pos: int, *answers: Answer) -> Metric:
    """Make a metric, checking position and answers as far as that goes without a model."""
    if isinstance(pos, bool) or not isinstance(pos, int):
        raise checks.InputError(
            f"{name}: pos must be one whole number, counted over the tokens of each prompt, -1 for "
            f"the last; got {pos!r}."
        )
    whats = ("answer", "wrong")[: len(answers)]
    frozen = {
        what: targets_of.freeze(answer, f"{name}: {what}")
        for what, answer in zip(whats, answers, strict=True)
    }
    return Metric(name, pos=pos, **frozen)


def logit_diff(answer: Answer, wrong: Answer, pos: int = -1) -> Metric:
    """Mean logit of the right tokens minus mean logit of the wrong ones.

    Args:
        answer: `" Mary"` (with its space) or an id, for all prompts; a list of these, one for each
            prompt; a list of lists, or a tensor of ids `[prompts, k]`, where several tokens are
            acceptable. `[prompts]` tensors are one for each.
        wrong: The wrong token or tokens, likewise.
        pos: The token after which the prediction is read; see `Metric`.

    Raises:
        InputError: If an answer is not of these forms.

    Example:
        >>> logit_diff(" Mary", " John")
        logit_diff(' Mary', ' John')
        >>> logit_diff([" Mary", " Ann"], [" John", " Tom"], pos=3).answer
        (' Mary', ' Ann')
    """
    return _metric("logit_diff", pos, answer, wrong)


def logit(answer: Answer, pos: int = -1) -> Metric:
    """Mean logit of the answers; arguments as in `logit_diff`."""
    return _metric("logit", pos, answer)


def prob(answer: Answer, pos: int = -1) -> Metric:
    """Total probability of the answers, 0 to 1; arguments as in `logit_diff`."""
    return _metric("prob", pos, answer)


def prob_diff(answer: Answer, wrong: Answer, pos: int = -1) -> Metric:
    """Total probability of the answers minus that of the wrong ones; arguments as in `logit_diff`.

    The metric of the greater-than task (Hanna et al. 2023): later years against the others.
    """
    return _metric("prob_diff", pos, answer, wrong)


def log_prob(answer: Answer, pos: int = -1) -> Metric:
    """Logarithm of the answers' total probability, in nats; arguments as in `logit_diff`."""
    return _metric("log_prob", pos, answer)


def rank(answer: Answer, pos: int = -1) -> Metric:
    """Number of tokens likelier than the likeliest answer, 0 for the top; see `logit_diff`."""
    return _metric("rank", pos, answer)


def kl(pos: int = -1) -> Metric:
    """KL(p_clean || p), in nats: 0 if the prediction is that of the clean run."""
    return _metric("kl", pos)


def entropy(pos: int = -1) -> Metric:
    """Entropy of the prediction, in nats."""
    return _metric("entropy", pos)


def cross_entropy() -> Metric:
    """Mean next-token loss of each prompt over its real tokens, in nats."""
    return Metric("cross_entropy")


def as_metric(metric: Metric | Callable[[Tensor], Any]) -> Metric:
    """Return a metric as it is, and a callable as a metric that reads everything.

    Args:
        metric: A `Metric`, or `f(logits [prompts, pos, d_vocab])` that returns one number for all
            prompts (each prompt is then given that number) or one for each, `[prompts]`. Prompts
            of unequal length are padded on the left, so -1 is the last token of all.

    Raises:
        InputError: If it is neither.

    Example:
        >>> as_metric(lambda logits: logits[:, -1].amax(-1)).whole
        True
    """
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, BoundMetric) or not callable(metric):
        raise checks.InputError(
            "A metric is made by optlens.metrics, such as logit_diff(' Mary', ' John'), or is a "
            f"function of logits [prompts, pos, d_vocab]; got {metric!r}."
        )
    if any(metric is factory for factory in _FACTORIES):
        raise checks.InputError(
            f"{metric.__name__} makes a metric and is not one itself: call it, "
            f"{metric.__name__}(...)."
        )
    return Metric("custom", function=metric)


_FACTORIES = (logit_diff, logit, prob, prob_diff, log_prob, rank, kl, entropy, cross_entropy)
