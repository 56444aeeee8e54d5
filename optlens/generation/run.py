"""From a request to a result: checks it, attaches what was asked for, runs step by step."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optlens import checks
from optlens.generation.beams import BeamSearch
from optlens.generation.decode import Decoding
from optlens.generation.options import GenerationOptions
from optlens.generation.processing import Processing
from optlens.generation.result import Generation
from optlens.generation.rows import Rows, whole_step
from optlens.generation.stopping import StopStrings, eos_tokens
from optlens.interventions.edits import Session
from optlens.recorder import Recorder

if TYPE_CHECKING:
    from optlens.inputs import Prompt
    from optlens.interventions import Intervention
    from optlens.kv_cache import KVCache
    from optlens.model import OPTForCausalLM

RECORD_OPTIONS = ("what", "layers", "heads", "dtype", "device")


class Job:
    """One request for a generation, ready to run.

    Attributes:
        model: The model.
        options: What was asked for.
        is_text: Whether the prompt was text.
        strategy: `Decoding` or `BeamSearch`: what to step until it is done.
    """

    def __init__(
        self,
        model: OPTForCausalLM,
        prompt: Prompt | None = None,
        max_new_tokens: int | None = 20,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: KVCache | None = None,
        prepend_bos: bool = True,
        interventions: Intervention | Iterable[Intervention] = (),
        spans: Mapping[str, Any] | None = None,
        record: str | Iterable[str] | Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Check everything that can be checked before running; arguments as for `generate`."""
        if not hasattr(model, "lm_head"):
            raise checks.InputError(
                f"An {type(model).__name__} has no unembedding to write with; use an OPTForCausalLM."
            )
        if (prompt is None) == (input_ids is None):
            raise checks.InputError(
                "Give one prompt: a text, a list of texts, or token ids, which may also be named "
                f"input_ids=; got {'none' if prompt is None else 'both a prompt and input_ids'}."
            )
        prompt = input_ids if prompt is None else prompt
        self.model = model
        self.options = GenerationOptions.of(max_new_tokens=max_new_tokens, **options)
        self.is_text = not isinstance(prompt, Tensor)
        self.is_single = isinstance(prompt, str) or (not self.is_text and prompt.ndim == 1)
        tokens, mask = model.prepare_inputs(prompt, attention_mask, prepend_bos=prepend_bos)
        checks.past_key_values(past_key_values, model.config.n_layers)
        if attention_mask is None and mask is None:  # which a padded past does not allow
            checks.attention_mask(None, *tokens.shape, past_key_values)
        if mask is not None and not bool(mask[:, -1].all()):
            raise checks.InputError(
                f"Prompt {int((mask[:, -1] == 0).nonzero()[0])} ends in padding, but new tokens come "
                "at the end; pad on the left, as model.to_tokens_and_mask does with texts."
            )
        if not self.is_text:
            self._prompts = None
        else:
            self._prompts = [prompt] if self.is_single else list(prompt)
        n_new = _fitting_length(self.options, tokens.shape[1], model.config.n_ctx)
        rows = Rows(model, tokens, mask, n_new, past_key_values)
        self.seed, generator = _generator(self.options, model.device)
        self.strategy = self._make_strategy(rows, generator)
        self._session = Session(model, interventions, spans)
        self._recorder = None if record is None else self._make_recorder(record, rows)

    def _make_strategy(
        self, rows: Rows, generator: torch.Generator | None
    ) -> Decoding | BeamSearch:
        options, config, tokenizer = self.options, self.model.config, self.model.tokenizer
        eos = eos_tokens(config, options.eos_token_id) if options.stop_at_eos else ()
        stop_strings = None
        if options.stop_strings:
            if tokenizer is None:
                raise checks.InputError(
                    "stop_strings needs a tokenizer, and this model has none; use eos_token_id=."
                )
            stop_strings = StopStrings(options.stop_strings, tokenizer)
        processing = Processing(options, eos, config.vocab_size, tokenizer)
        kind = Decoding if options.num_beams == 1 else BeamSearch
        return kind(rows, options, processing, stop_strings, generator)

    def _make_recorder(self, record: Any, rows: Rows) -> Recorder:
        if self.options.num_beams > 1:
            raise checks.InputError(
                "A beam search drops and copies texts while it runs, so it cannot be recorded; "
                "record its result: model.record(result.sequences, attention_mask=result.mask)."
            )
        asked = dict(record) if isinstance(record, Mapping) else {"what": record}
        unknown = [name for name in asked if name not in RECORD_OPTIONS]
        if unknown or "what" not in asked:
            raise checks.InputError(
                f"record= takes what model.record takes as what=, or a dict of "
                f"{', '.join(RECORD_OPTIONS)} in which what is given; got {record!r}."
            )
        shape = (len(rows.tokens) * self.options.num_return_sequences, rows.capacity)
        choice = {"layers": None, "heads": None} | asked
        with self._session.attached():  # so that it sees what is edited
            return Recorder(self.model, shape=shape, in_parts=True, **choice)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Run the model as the request asks, inside a `with` block: one step, or all."""
        model, recorder = self.model, self._recorder
        kept = nullcontext() if recorder is None else model.recorders(recorder.points, self._keep)
        with torch.no_grad(), model.in_eval_mode(), self._session.attached(), kept:
            yield

    def _keep(self, value: Tensor, hook: Any) -> None:
        self._recorder.first = hook.now.seen
        self._recorder.keep(value, hook)

    def run(self) -> bool:
        """Write until all texts have ended; return whether the user interrupted it."""
        with self.active():
            try:
                while not self.strategy.done:
                    with whole_step(self.strategy):
                        self.strategy.step()
            except KeyboardInterrupt:
                return True
        return False

    def result(self, interrupted: bool = False) -> Generation:
        """Return what is written so far."""
        strategy, rows = self.strategy, self.strategy.rows
        sequences, mask = strategy.finish()
        copies = len(strategy.reasons) // len(sequences)
        if copies > 1:  # interrupted in the first step
            sequences, mask = (part.repeat_interleave(copies, 0) for part in (sequences, mask))
        otherwise = "interrupted" if interrupted else "length"
        reasons = [reason or otherwise for reason in strategy.reasons]
        recording = None
        if self._recorder is not None and rows.length > rows.prompt_length:
            recording = self._recording(sequences, mask)
        has_past = self.options.num_beams == 1 and copies == 1
        return Generation(
            sequences,
            scores=tuple(strategy.scores[: rows.step]) if self.options.output_scores else None,
            logits=tuple(strategy.logits[: rows.step]) if self.options.output_logits else None,
            sequences_scores=strategy.sequences_scores,
            past_key_values=rows.cache if has_past else None,
            recording=recording,
            texts=self._texts(sequences, mask, rows.prompt_length),
            mask=mask,
            prompt_length=rows.prompt_length,
            finish_reasons=reasons,
            seed=self.seed,
            options=self.options,
            model=self.model,
        )

    def _recording(self, sequences: Tensor, mask: Tensor) -> Any:
        """Run the last token, which no other followed, and wrap what was kept."""
        rows, recorder = self.strategy.rows, self._recorder
        with self.active():
            if rows.cache.get_seq_length() < rows.length:
                rows.logits()
            is_batch = not self.is_single or len(sequences) > 1
            positions = list(range(sequences.shape[1]))
            recording = recorder.recording(sequences, mask, positions, is_batch)
        if "logit_lens" in recorder.what:
            from optlens.lens import store_lens

            store_lens(recording)
        return recording

    def _texts(self, sequences: Tensor, mask: Tensor, start: int) -> list[str] | None:
        tokenizer = self.model.tokenizer
        if tokenizer is None:
            return None
        n_copies = len(sequences) // len(self._prompts) if self._prompts else 1
        texts = []
        for number, (row, real) in enumerate(zip(sequences, mask, strict=True)):
            if self._prompts:
                new = tokenizer.decode(row[start:][real[start:]], skip_special=True)
                texts.append(self._prompts[number // n_copies] + new)
            else:  # in one piece, as the prompt may end within a character
                texts.append(tokenizer.decode(row[real], skip_special=True))
        return texts


def generate(
    model: OPTForCausalLM,
    prompt: Prompt | None = None,
    max_new_tokens: int | None = 20,
    *,
    return_dict: bool | None = None,
    **options: Any,
) -> str | list[str] | Tensor | Generation:
    """Write on from a prompt.

    Text in gives text out, prompt included: a string for a string, a list for a list or for several
    texts. Token ids `[pos]` or `[batch, pos]` give token ids, prompt included, with padding behind
    texts that ended early, as transformers returns them. Gradients and dropout are off.

    An interrupt (Ctrl-C, a notebook's stop button) ends the writing, not the program: what is written
    so far is returned, with a warning and, in a result object, with `partial` True.

    Hook functions attached to the model act in every pass; `hook.now` tells them positions, phase
    ("prefill" for the prompt, "decode" after it) and step. Step s chooses new token number s; its pass
    reads the prompt (s = 0) or new token s - 1. A hook sees only the positions of its pass.

    Args:
        model: The model.
        prompt: A text, a list of texts, or token ids.
        max_new_tokens: How many tokens to write at most; None for as many as the context takes.
        return_dict: Return a `Generation`: tokens, texts, scores, why each ended, the seed, and
            `fork(step, ...)`. On by itself with `record`, `output_scores` or `output_logits`.
        **options: Those of `GenerationOptions`, and these:
            input_ids: Another name for a prompt of token ids.
            attention_mask: For token ids that are padded on the left, `[batch, pos]`.
            past_key_values: Keys and values of the first tokens of the prompt, of an earlier run;
                the prompt is still the whole text. They are not changed.
            prepend_bos: Whether text gets `</s>` in front; True by default.
            interventions: What to change in this run; positions count from the start of each text,
                so `Steer(..., start=n)` acts from position n on.
            spans: Names for positions, as `model.intervene` takes them.
            record: What to record, as `what` of `model.record`, or a dict with any of its options
                what, layers, heads, dtype and device; the result's `recording` then is what
                `model.record` would give of the finished texts.

    Raises:
        InputError: If the prompt is empty, or all padding, or would outgrow the context; if an option
            is unknown or contradicts another; all before anything runs.

    Example:
        >>> import optlens
        >>> model = optlens.load()
        >>> model.generate("The cat sat on the", max_new_tokens=1).startswith("The cat sat on the")
        True
        >>> model.generate(model.to_tokens("The cat"), 3, temperature=0.7, seed=0).shape[0]
        1
    """
    job = Job(model, prompt, max_new_tokens, **options)
    more = [name for name in ("record", "output_scores", "output_logits") if options.get(name)]
    if return_dict is False and more:
        raise checks.InputError(
            f"{more[0]} is part of the result object; leave out return_dict=False."
        )
    interrupted = job.run()
    result = job.result(interrupted)
    if interrupted:
        steps = job.strategy.rows.step
        warnings.warn(
            f"Interrupted after {steps} of at most {job.strategy.rows.capacity - result.prompt_length}"
            " new tokens; this is what was written until then.",
            stacklevel=3,
        )
    if return_dict or more:
        return result
    several = not job.is_single or len(result.sequences) > 1
    if job.is_text:
        return result.texts if several else result.texts[0]
    return result.sequences if several else result.sequences[0]


def _fitting_length(options: GenerationOptions, length: int, n_ctx: int) -> int:
    """Return how many tokens may be added to prompts of this length."""
    free = n_ctx - length
    if free < 1 or (options.max_new_tokens or 0) > free:
        room = f"at most max_new_tokens={free} fit" if free > 0 else "there is no room for more"
        raise checks.InputError(
            f"The prompt has {length} tokens and max_new_tokens={options.max_new_tokens}, but this "
            f"model has positions for {n_ctx} only: {room}; or shorten the prompt."
        )
    least = max(options.min_new_tokens or 0, (options.min_length or 0) - length)
    n_new = free if options.max_new_tokens is None else options.max_new_tokens
    if least > n_new:
        raise checks.InputError(
            f"min_length={options.min_length} or min_new_tokens={options.min_new_tokens} asks for "
            f"{least} new tokens, but only {n_new} may be written; raise max_new_tokens."
        )
    return n_new


def _generator(
    options: GenerationOptions, device: torch.device
) -> tuple[int | None, torch.Generator | None]:
    """Return a sample's seed and a generator that starts with it; None for no sample."""
    if not options.samples:
        return None, None
    generator = torch.Generator(device)
    if options.seed is None:
        return generator.seed(), generator
    generator.manual_seed(options.seed)
    return options.seed, generator
