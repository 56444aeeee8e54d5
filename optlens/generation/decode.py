"""Writing one token after another: the likeliest, or one drawn by its probability."""

from __future__ import annotations

import torch
from torch import Tensor

from optlens.generation.options import GenerationOptions
from optlens.generation.processing import Processing
from optlens.generation.rows import Rows
from optlens.generation.stopping import StopStrings


class Decoding:
    """Greedy decoding or sampling, one step at a time.

    Attributes:
        rows: The texts.
        reasons: Why each text ended: "eos", "stop_string"; None while it goes on.
        scores: The scores of each step, `[row, d_vocab]`, if they are kept.
        logits: The model's logits of each step, likewise.
    """

    sequences_scores: Tensor | None = None

    def __init__(
        self,
        rows: Rows,
        options: GenerationOptions,
        processing: Processing,
        stop_strings: StopStrings | None,
        generator: torch.Generator | None,
    ) -> None:
        """Start with prompts that nobody has run; `generator` is for sampling."""
        self.rows, self.options, self.processing = rows, options, processing
        self._stop_strings, self._generator = stop_strings, generator
        self.reasons: list[str | None] = [None] * (len(rows.tokens) * options.num_return_sequences)
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []
        device = rows.tokens.device
        self._eos = torch.tensor(processing.eos, dtype=torch.long, device=device)

    @property
    def done(self) -> bool:
        """Whether every text has ended or there is no room for more."""
        return self.rows.length == self.rows.capacity or all(self.reasons)

    def step(self) -> Tensor:
        """Add a token to every text; return them, `[row]`."""
        rows = self.rows
        logits = rows.logits()
        if len(rows.tokens) < len(self.reasons):  # the prompts are run once, however many texts
            copies = self.options.num_return_sequences
            rows.multiply(copies)
            logits = logits.repeat_interleave(copies, 0)
        scores = self.processing(logits, rows)
        tokens = self._choose(scores)
        ended = any(self.reasons)
        going_on = None
        if ended:
            going_on = torch.tensor([r is None for r in self.reasons], device=tokens.device)
            tokens = tokens.where(going_on, rows.pad)
        if self.options.output_scores:
            self.scores[rows.step :] = [scores]
        if self.options.output_logits:
            self.logits[rows.step :] = [logits]
        rows.append(tokens, going_on)
        self._note_ends(tokens)
        return tokens

    def _choose(self, scores: Tensor) -> Tensor:
        if self._generator is None:
            return scores.argmax(-1)
        return torch.multinomial(scores.softmax(-1), 1, generator=self._generator).squeeze(1)

    def _note_ends(self, tokens: Tensor) -> None:
        reasons = list(self.reasons)
        if len(self._eos):
            for row, is_eos in enumerate(torch.isin(tokens, self._eos).tolist()):
                if is_eos and reasons[row] is None:
                    reasons[row] = "eos"
        if self._stop_strings is not None:
            written = self.rows.tokens[:, : self.rows.length]
            for row, found in enumerate(self._stop_strings.completed(written, self.rows.first)):
                if found and reasons[row] is None:
                    reasons[row] = "stop_string"
        self.reasons = reasons

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return tokens and mask, `[row, pos]`, of what is written."""
        rows = self.rows
        return rows.tokens[:, : rows.length], rows.real[:, : rows.length]
