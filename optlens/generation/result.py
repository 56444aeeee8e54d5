"""What a generation returns when more is wanted than the text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optlens.checks import InputError
from optlens.generation.options import GenerationOptions
from optlens.kv_cache import KVCache
from optlens.outputs import ModelOutput

if TYPE_CHECKING:
    from optlens.model import OPTForCausalLM
    from optlens.recording import Recording


@dataclass(eq=False)
class Generation(ModelOutput):
    """Texts with their prompts, and how they came about.

    Attributes:
        sequences: Tokens of prompts and continuations, `[text, pos]`; texts that ended early are
            filled up with padding. The texts of one prompt come one after another.
        scores: With `output_scores`, for each step the logits after all processing (in a beam
            search log-probabilities), `[row, d_vocab]`, float32.
        logits: With `output_logits`, for each step the logits as the model gave them, likewise.
        sequences_scores: Of a beam search: each text's log-probability over its length to the power
            `length_penalty`, `[text]`.
        past_key_values: Keys and values of all tokens but the last, or, with a recording, of all
            tokens; None after a beam search, or if several texts were interrupted before the first token.
        recording: With `record=`, the `Recording` over prompts and continuations.
        texts: Prompt and continuation as text, without special tokens; None without a tokenizer.
        mask: True at real tokens, `[text, pos]`.
        prompt_length: Columns that the prompts take.
        finish_reasons: Why each text ended: "eos", "stop_string", "length", or "interrupted".
        seed: The seed of a sample: the same one gives the same texts again.
        options: What was asked for.
    """

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    sequences_scores: Tensor | None = None
    past_key_values: KVCache | None = None
    recording: Recording | None = None
    texts: list[str] | None = None
    mask: Tensor | None = None
    prompt_length: int = 0
    finish_reasons: list[str] = field(default_factory=list)
    seed: int | None = None
    options: GenerationOptions = field(default_factory=GenerationOptions)
    model: OPTForCausalLM | None = field(default=None, repr=False)

    @property
    def main(self) -> Tensor:
        """The tokens."""
        return self.sequences

    @property
    def partial(self) -> bool:
        """Whether the user interrupted it."""
        return "interrupted" in self.finish_reasons

    @property
    def new_tokens(self) -> list[list[int]]:
        """The continuation of each text, without padding."""
        mask, start = self.mask[:, self.prompt_length :], self.prompt_length
        return [
            row[real].tolist() for row, real in zip(self.sequences[:, start:], mask, strict=True)
        ]

    def fork(
        self,
        step: int,
        token: int | str | Sequence[int] | Tensor | None = None,
        text: int | None = None,
        **changes: Any,
    ) -> Generation:
        """Go back to a step and go on from there in another way.

        Keys and values of the tokens before are taken over as they are, with whatever interventions
        made them; interventions given here act from the fork on. After a beam search, which does
        not keep them, the tokens are run again.

        Args:
            step: How many new tokens to keep: the token number `step`, from 0, is the first to be
                chosen anew.
            token: That token: an id, its text, or an id for each text; chosen anew unless given.
            text: Go on with this one of the texts alone; all unless given.
            **changes: Options that shall differ, and `interventions`, `spans` and `record`. By
                default the text may become as long as before. A sample gets a new seed.

        Returns:
            Another result, whose prompts are the texts up to the fork.

        Raises:
            InputError: If there is no such step, or a text had ended before it.

        Example:
            >>> import optlens
            >>> model = optlens.load()
            >>> result = model.generate("Once upon a time", 8, return_dict=True)
            >>> other = result.fork(3, token=" dog")
            >>> other.sequences[0, other.prompt_length - 1] == model.to_single_token(" dog")
            tensor(True)
        """
        n_steps = self.sequences.shape[1] - self.prompt_length
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= n_steps:
            raise InputError(f"There is no step {step!r} to fork at: steps go from 0 to {n_steps}.")
        rows = self._rows(text)
        length = self.prompt_length + step
        tokens, mask = self.sequences[rows, :length], self.mask[rows, :length]
        if not bool(mask[:, -1].all()):
            ended = int(rows[(~mask[:, -1]).nonzero()[0]])
            raise InputError(f"Text {ended} had ended before step {step}; fork earlier, or text=.")
        if token is not None:
            tokens = torch.cat([tokens, self._column(token, len(rows))], 1)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        past = self.past_key_values
        if past is not None:
            past = past.copy(min(past.get_seq_length(), tokens.shape[1] - 1))
            past.select(rows)
        from optlens.generation.run import generate

        options = self._options(tokens.shape[1] - self.prompt_length, changes)
        return generate(
            self.model,
            tokens,
            attention_mask=mask.long(),
            past_key_values=past,
            return_dict=True,
            **options,
        )

    def _rows(self, text: int | None) -> Tensor:
        rows = torch.arange(len(self.sequences), device=self.sequences.device)
        if text is None:
            return rows
        if type(text) is not int or not -len(rows) <= text < len(rows):
            raise InputError(f"There is no text {text!r}: they go from 0 to {len(rows) - 1}.")
        return rows[[text]]

    def _column(self, token: int | str | Sequence[int] | Tensor, n_rows: int) -> Tensor:
        ids = self.model.to_single_token(token) if isinstance(token, str) else token
        ids = torch.as_tensor(ids, device=self.sequences.device).reshape(-1, 1)
        if len(ids) not in (1, n_rows) or ids.is_floating_point():
            raise InputError(
                f"token must be one, or one for each of {n_rows} texts, got {token!r}."
            )
        return ids.long().expand(n_rows, 1)

    def _options(self, written: int, changes: dict[str, Any]) -> dict[str, Any]:
        """Return the options of a fork: those of this run with changes."""
        before = {f.name: getattr(self.options, f.name) for f in dataclasses.fields(self.options)}
        before |= {"num_return_sequences": 1, "seed": None, "do_sample": self.options.samples}
        before["min_new_tokens"] = max(0, (self.options.min_new_tokens or 0) - written) or None
        if "max_new_tokens" not in changes and self.options.max_new_tokens is not None:
            before["max_new_tokens"] = self.options.max_new_tokens - written
            if before["max_new_tokens"] < 1:
                raise InputError(
                    f"The text had {self.options.max_new_tokens} new tokens at most, which the fork "
                    "has already; give max_new_tokens=, how many to add."
                )
        sampling = ("temperature", "top_k", "top_p", "min_p", "typical_p", "seed")
        if changes.get("do_sample") is False:
            before |= dict.fromkeys(sampling)
        elif any(changes.get(name) is not None for name in sampling):
            before["do_sample"] = None
        if changes.get("num_beams") == 1:
            before |= {"length_penalty": None, "early_stopping": None}
        return before | changes
