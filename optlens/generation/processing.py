"""From the model's logits to the scores a token is chosen by: the options, applied in transformers' order."""

from __future__ import annotations

import torch
from torch import Tensor

from optlens.checks import InputError
from optlens.generation import warpers
from optlens.generation.options import GenerationOptions
from optlens.generation.rows import Rows
from optlens.tokenizer import OPTTokenizer


class Processing:
    """Penalties and bans, then the user's callables, then what narrows a sample."""

    def __init__(
        self,
        options: GenerationOptions,
        eos: tuple[int, ...],
        n_vocab: int,
        tokenizer: OPTTokenizer | None,
    ) -> None:
        """Prepare what the options ask for.

        Raises:
            InputError: If a word to avoid is not in the vocabulary, or is text without a tokenizer.
        """
        self.options, self.eos = options, eos
        self.banned = _banned(options, n_vocab, tokenizer)
        # a beam search needs tokens that let it go on beside those that end a text
        self.at_least = 1 if options.num_beams == 1 else max(len(eos) + 1, 2)
        narrows = ("temperature", "top_k", "top_p", "min_p", "typical_p")
        changes = ("repetition_penalty", "no_repeat_ngram_size", "min_new_tokens", "min_length")
        active = [getattr(options, name) for name in changes]
        active += [options.logits_processor, self.banned]
        active += [getattr(options, name) for name in narrows] if options.samples else []
        self.idle = not any(given not in (None, [], 0) for given in active)

    def __call__(self, logits: Tensor, rows: Rows) -> Tensor:
        """Return scores `[row, d_vocab]`; what must not be chosen is -inf.

        Raises:
            InputError: If nothing is left to choose from, or a callable returns something unfit.
        """
        if self.idle:
            return logits
        tokens, real = rows.tokens[:, : rows.length], rows.real[:, : rows.length]
        scores = self._restrain(logits, tokens, real, rows.step)
        for processor in self.options.logits_processor or ():
            scores = _checked(processor(tokens, scores.clone()), scores, processor)
        if self.options.samples:
            scores = self._narrow(scores)
        best = scores.amax(-1)
        if not bool(best.isfinite().all()):
            row = int((~best.isfinite()).nonzero()[0])
            raise InputError(
                f"At step {rows.step} no token is left to choose in row {row}: bad_words, "
                "no_repeat_ngram_size, the minimum length and logits_processor together forbid all, "
                "or a logits_processor returned NaN or infinity. Loosen one of them."
            )
        return scores

    def _restrain(self, logits: Tensor, tokens: Tensor, real: Tensor, step: int) -> Tensor:
        options = self.options
        if options.repetition_penalty is not None and options.repetition_penalty != 1:
            penalty = options.repetition_penalty
            logits = warpers.penalize_repetition(logits, tokens, real, penalty)
        if options.no_repeat_ngram_size is not None:
            size = options.no_repeat_ngram_size
            logits = warpers.forbid_repeated_ngrams(logits, tokens, real, size)
        if self.banned:
            logits = warpers.forbid_sequences(logits, tokens, self.banned)
        if options.min_length or step < (options.min_new_tokens or 0):
            least = (
                options.min_length or torch.inf
            )  # without min_length, no text is long enough yet
            short = real.sum(-1) < least
            logits = warpers.forbid_tokens(logits, self.eos, short)
        return logits

    def _narrow(self, scores: Tensor) -> Tensor:
        options, at_least = self.options, self.at_least
        if options.temperature is not None and options.temperature != 1:
            scores = scores / options.temperature
        if options.top_k is not None:
            scores = warpers.keep_top_k(scores, max(options.top_k, at_least))
        if options.top_p is not None and options.top_p < 1:
            scores = warpers.keep_top_p(scores, options.top_p, at_least)
        if options.min_p is not None:
            scores = warpers.keep_min_p(scores, options.min_p, at_least)
        if options.typical_p is not None and options.typical_p < 1:
            scores = warpers.keep_typical(scores, options.typical_p, at_least)
        return scores


def _banned(
    options: GenerationOptions, n_vocab: int, tokenizer: OPTTokenizer | None
) -> list[tuple[int, ...]]:
    """Return the token sequences of the words to avoid."""
    found: list[tuple[int, ...]] = []
    for word in options.bad_words or ():
        if not isinstance(word, str):
            found.append(tuple(word))
        elif tokenizer is None:
            raise InputError(
                f"bad_words has the text {word!r}, but this model has no tokenizer; give lists of "
                "token ids."
            )
        else:
            spellings = [word] if word[0].isspace() else [word, f" {word}"]
            found += [tuple(tokenizer.encode(text, prepend_bos=False)) for text in spellings]
    for sequence in found:
        if max(sequence) >= n_vocab:
            raise InputError(
                f"bad_words has token id {max(sequence)}; this model has ids 0 to {n_vocab - 1}."
            )
    return list(dict.fromkeys(found))


def _checked(result: object, given: Tensor, processor: object) -> Tensor:
    """Refuse what a user's callable must not return."""
    if not isinstance(result, Tensor) or result.shape != given.shape:
        what = list(result.shape) if isinstance(result, Tensor) else f"a {type(result).__name__}"
        raise InputError(
            f"logits_processor {getattr(processor, '__name__', processor)!r} returned {what}; it must "
            f"return logits [batch, d_vocab] = {list(given.shape)}."
        )
    return result.to(given.dtype)
