"""The texts that are being written, as rows of one batch: their tokens, and the passes over them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optlens.checks import InputError
from optlens.kv_cache import KVCache, undone_on_failure

if TYPE_CHECKING:
    from optlens.model import OPTForCausalLM


class Rows:
    """A batch of texts with room for the tokens to come.

    Attributes:
        tokens: `[row, capacity]`, of which the first `length` columns are written.
        real: True where a token is no padding; padding stands before a short prompt and behind a
            text that ended early.
        first: The column in which each text begins, `[row]`.
        prompt_length: Columns of the prompts.
        length: Columns written so far.
        cache: Keys and values of the tokens that the model has seen.
    """

    def __init__(
        self,
        model: OPTForCausalLM,
        prompt: Tensor,
        mask: Tensor | None,
        max_new_tokens: int,
        past: KVCache | None,
    ) -> None:
        """Set memory aside for the whole generation.

        Args:
            model: The model.
            prompt: Token ids, `[row, pos]`.
            mask: Ones at real tokens; None if nothing is padding.
            max_new_tokens: How many columns may be added.
            past: Keys and values of the first tokens of the prompt. It is copied, not changed.
        """
        self.model, self.prompt_length = model, prompt.shape[1]
        self.length, self.capacity = prompt.shape[1], prompt.shape[1] + max_new_tokens
        pad = model.config.pad_token_id
        self.pad = pad if pad is not None and pad >= 0 else 0
        self.tokens = prompt.new_full((len(prompt), self.capacity), self.pad)
        self.tokens[:, : self.length] = prompt
        self.real = torch.ones_like(self.tokens, dtype=torch.bool)
        if mask is not None:
            self.real[:, : self.length] = mask.to(self.real.device).bool()
        self.padded = mask is not None
        self.first = self.real.int().argmax(-1)
        if past is None:
            self.cache = KVCache(self.capacity)
        else:
            _check_past(past, prompt)
            self.cache = past.copy(room=self.capacity)
            self.cache.has_padding = self.padded  # there, it may have been in other rows
        self._logits: Tensor | None = None

    @property
    def step(self) -> int:
        """How many tokens have been added."""
        return self.length - self.prompt_length

    def logits(self) -> Tensor:
        """Run what the model has not seen yet; return the logits of the next token, float32."""
        seen, now = self.cache.get_seq_length(), self.model.now
        if seen == self.length:  # a recording has run the last token already
            return self._logits
        mask = self.real[:, : self.length] if self.padded else None
        now.step = self.step
        try:
            out = self.model(
                self.tokens[:, seen : self.length],
                attention_mask=mask,
                past_key_values=self.cache,
                logits_to_keep=1,
            )
        finally:
            now.step = None
        # a divided model may have its unembedding on another device than its embedding
        self._logits = out.logits[:, -1].to(self.tokens.device, torch.float32)
        return self._logits

    def multiply(self, copies: int) -> None:
        """Write several texts for each prompt: row r becomes rows r * copies and those after it."""
        rows = torch.arange(len(self.tokens), device=self.tokens.device)
        rows = rows.repeat_interleave(copies)
        self.tokens, self.real = self.tokens[rows], self.real[rows]
        self.first = self.first[rows]
        self.cache.select(rows)

    def append(self, tokens: Tensor, real: Tensor | None = None) -> None:
        """Add one token to each row, `[row]`; None for `real` if all texts go on."""
        self.tokens[:, self.length] = tokens
        if real is not None:
            self.real[:, self.length] = real
            self.padded = True
        self.length += 1


@contextmanager
def whole_step(strategy: Any) -> Iterator[None]:
    """Take back what a step has done to a strategy and its rows, if an error or interrupt cuts it off.

    What they hold is replaced in a step, or written behind what counts, so the old values are there.
    """
    before = [(part, dict(vars(part))) for part in (strategy, strategy.rows)]
    try:
        with undone_on_failure(strategy.rows.cache):
            yield
    except BaseException:
        for part, values in before:
            vars(part).update(values)
        raise


def _check_past(past: KVCache, prompt: Tensor) -> None:
    if past.get_seq_length() >= prompt.shape[1]:
        raise InputError(
            f"past_key_values holds {past.get_seq_length()} tokens, but the prompt has "
            f"{prompt.shape[1]}; the prompt is the whole text so far, of which past_key_values holds "
            "the first tokens, and at least its last token must be new."
        )
