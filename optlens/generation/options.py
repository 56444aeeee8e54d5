"""How to write on: every option of generation, checked before anything runs."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from optlens.checks import InputError

Processor = Callable[[Tensor, Tensor], Tensor]

# Names that users of other libraries may try, and what to do here instead.
ELSEWHERE = {
    "inputs": "the prompt comes first, without a name; token ids also as input_ids=",
    "max_length": "max_new_tokens= counts the new tokens alone",
    "bad_words_ids": "give the same lists as bad_words=",
    "return_dict_in_generate": "it is return_dict= here",
    "streamer": "iterate over model.stream(...)",
    "logits_processors": "it is logits_processor=, one callable or a list of them",
    "stop": "it is stop_strings= here",
    "verbose": "nothing is printed anyhow",
    "return_type": "text gives text, token ids give token ids; return_dict=True gives both",
    "use_cache": "keys and values are always cached",
    "freq_penalty": "there is repetition_penalty=, or a callable as logits_processor=",
    "padding_side": "texts are padded on the left",
    "pad_token_id": "it is the config's",
}


@dataclass(frozen=True)
class GenerationOptions:
    """Options of `model.generate` and `model.stream`, under transformers' names.

    Decoding is greedy unless `do_sample=True`, or one of temperature, top_k, top_p, min_p, typical_p
    and seed is given, which ask for sampling; `num_beams` above 1 searches with beams. None always
    means that an option is off. Lengths count each prompt's real tokens.

    Attributes:
        max_new_tokens: How many tokens to write at most; None for as many as the context takes.
        min_new_tokens: End no text before it has so many new tokens.
        min_length: The same, counted with the prompt.
        do_sample: Draw tokens by their probability (True), or take the likeliest (False).
        temperature: Divide the logits by it: below 1 for the likely, above 1 for the surprising.
        top_k: Draw among the k likeliest.
        top_p: Draw among the likeliest that together have this probability.
        min_p: Draw among those with at least this fraction of the likeliest one's probability.
        typical_p: Draw among those whose surprise is nearest to the expected one, up to this mass.
        repetition_penalty: Divide positive and multiply negative logits of tokens seen before.
        no_repeat_ngram_size: Let no run of so many tokens occur twice.
        bad_words: Texts, or lists of token ids, that must not be written. A text is forbidden as it
            stands and with a blank before it, each as the tokens into which it is encoded.
        stop_strings: Texts that end a text when they are complete, wherever tokens begin and end.
        stop_at_eos: Whether the end-of-text token ends a text.
        eos_token_id: That token, or several; the config's unless given.
        num_beams: How many beams to search with; 1 for none.
        length_penalty: Beams are compared by log-probability over length to this power (1.0).
        early_stopping: End a beam search when num_beams texts have ended (True); when a better one
            is unlikely (False, the default); when it is impossible ("never").
        num_return_sequences: How many texts for each prompt.
        seed: For sampling, a whole number; drawn from the system unless given, and returned. Torch's
            global generator is neither read nor changed.
        logits_processor: Callables `f(tokens [batch, pos], logits [batch, d_vocab]) -> logits`, which
            act after the penalties and before temperature. Transformers' processors fit.
        output_scores: Return the logits after all processing, of every step.
        output_logits: Return the logits as the model gave them, of every step.

    Raises:
        InputError: If an option has an impossible value, or two contradict each other.

    Example:
        >>> GenerationOptions.of(temperature=0.7, top_p=0.9).samples
        True
    """

    max_new_tokens: int | None = 20
    min_new_tokens: int | None = None
    min_length: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    bad_words: Sequence[str | Sequence[int]] | str | None = None
    stop_strings: Sequence[str] | str | None = None
    stop_at_eos: bool = True
    eos_token_id: int | Sequence[int] | None = None
    num_beams: int = 1
    length_penalty: float | None = None
    early_stopping: bool | str | None = None
    num_return_sequences: int = 1
    seed: int | None = None
    logits_processor: Processor | Sequence[Processor] | None = None
    output_scores: bool = False
    output_logits: bool = False

    @classmethod
    def of(cls, **options: Any) -> GenerationOptions:
        """Take options by name; a name that does not exist raises, suggesting what does."""
        names = [field.name for field in fields(cls)]
        for name in options:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = ELSEWHERE.get(name) or (f"did you mean {near[0]!r}?" if near else None)
                raise InputError(
                    f"Generation has no option {name!r}: {hint or 'there are ' + ', '.join(names)}."
                )
        return cls(**options)

    def __post_init__(self) -> None:
        """Bring lists to tuples; check values, then combinations."""
        for name in ("bad_words", "stop_strings", "logits_processor", "eos_token_id"):
            object.__setattr__(self, name, _as_tuple(getattr(self, name)))
        self._check_switches()
        self._check_numbers()
        self._check_lists()
        self._check_combinations()

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn."""
        return bool(self._sampling) if self.do_sample is None else self.do_sample

    @property
    def _sampling(self) -> list[str]:
        names = ("temperature", "top_k", "top_p", "min_p", "typical_p", "seed")
        return [name for name in names if getattr(self, name) is not None]

    def _check_switches(self) -> None:
        for name in ("do_sample", "stop_at_eos", "output_scores", "output_logits"):
            given = getattr(self, name)
            if not isinstance(given, bool) and (given is not None or name != "do_sample"):
                raise InputError(f"{name} must be True or False; got {given!r}.")

    def _check_numbers(self) -> None:
        for name in ("max_new_tokens", "top_k", "no_repeat_ngram_size"):
            self._check(name, Integral, lambda n: n >= 1, "a whole number of at least 1, or None")
        for name in ("min_new_tokens", "min_length"):
            self._check(name, Integral, lambda n: n >= 0, "a whole number of at least 0, or None")
        for name in ("num_beams", "num_return_sequences"):
            self._check(name, Integral, lambda n: n >= 1, "a whole number of at least 1", False)
        for name in ("temperature", "repetition_penalty"):
            more = "; greedy decoding is what leaving out all options of sampling gives"
            text = "a number above 0" + (more if name == "temperature" else "")
            self._check(name, Real, lambda x: 0 < x < float("inf"), text)
        for name in ("top_p", "typical_p"):
            self._check(name, Real, lambda x: 0 < x <= 1, "above 0 and at most 1")
        self._check("min_p", Real, lambda x: 0 <= x <= 1, "from 0 to 1")
        self._check("length_penalty", Real, lambda x: abs(x) < float("inf"), "a number")
        self._check("seed", Integral, lambda n: -(2**63) <= n < 2**64, "a whole number of 64 bits")
        if self.early_stopping not in (None, "never") and not isinstance(self.early_stopping, bool):
            raise InputError(
                f"early_stopping must be True, False or 'never', got {self.early_stopping!r}."
            )

    def _check(
        self, name: str, kind: type, good: Callable[[Any], bool], text: str, optional: bool = True
    ) -> None:
        given = getattr(self, name)
        if given is None and optional:
            return
        if not isinstance(given, kind) or isinstance(given, bool) or not good(given):
            raise InputError(f"{name} must be {text}; got {given!r}.")
        if kind is Integral:
            object.__setattr__(self, name, int(given))  # NumPy has whole numbers of its own

    def _check_lists(self) -> None:
        for text in self.stop_strings or ():
            if not isinstance(text, str) or not text:
                raise InputError(
                    f"stop_strings must be texts that are not empty, got {text!r} among them."
                )
        for word in self.bad_words or ():
            ids = isinstance(word, Sequence) and not isinstance(word, str)
            if not word or not (isinstance(word, str) or (ids and all(map(_is_id, word)))):
                raise InputError(
                    f"bad_words must be texts or lists of token ids, got {word!r} among them."
                )
        for processor in self.logits_processor or ():
            if not callable(processor):
                raise InputError(
                    "logits_processor must be f(tokens, logits) -> logits or several such, got "
                    f"{processor!r}."
                )
        for token in self.eos_token_id or ():
            if not _is_id(token):
                raise InputError(f"eos_token_id must be token ids, got {token!r}.")

    def _check_combinations(self) -> None:
        if self.do_sample is False and self._sampling:
            raise InputError(
                f"{self._sampling[0]}={getattr(self, self._sampling[0])} is for sampling, but "
                "do_sample=False asks for the likeliest token; leave out one of them."
            )
        if self.num_beams == 1:
            for name in ("length_penalty", "early_stopping"):
                if getattr(self, name) is not None:
                    raise InputError(
                        f"{name} is for beam search; give num_beams=, or leave it out."
                    )
            if self.num_return_sequences > 1 and not self.samples:
                raise InputError(
                    f"Greedy decoding has one answer, so num_return_sequences="
                    f"{self.num_return_sequences} would repeat it; add do_sample=True or num_beams=."
                )
        elif self.num_return_sequences > self.num_beams:
            raise InputError(
                f"num_return_sequences={self.num_return_sequences} is more than num_beams="
                f"{self.num_beams}; a beam search ends with as many texts as it has beams."
            )
        self._check_lengths()

    def _check_lengths(self) -> None:
        if self.min_new_tokens and self.min_length:
            raise InputError(
                f"Give min_new_tokens={self.min_new_tokens} or min_length={self.min_length} (which "
                "counts the prompt), not both."
            )
        if (self.min_new_tokens or 0) > (self.max_new_tokens or float("inf")):
            raise InputError(
                f"min_new_tokens={self.min_new_tokens} is more than max_new_tokens="
                f"{self.max_new_tokens}."
            )
        lost = [n for n in ("min_new_tokens", "min_length", "eos_token_id") if getattr(self, n)]
        if not self.stop_at_eos and lost:
            raise InputError(
                f"{lost[0]} is about the end-of-text token, which stop_at_eos=False ignores; leave "
                "out one of them."
            )


def _as_tuple(given: Any) -> tuple | None:
    if given is None:
        return None
    given = _plain(given)
    several = isinstance(given, Sequence) and not isinstance(given, str)
    return tuple(map(_plain, given)) if several else (given,)


def _plain(given: Any) -> Any:
    """Return a tensor or an array as a list, and anything else as it is."""
    return given.tolist() if hasattr(given, "tolist") else given


def _is_id(given: Any) -> bool:
    return isinstance(given, int) and not isinstance(given, bool) and given >= 0
