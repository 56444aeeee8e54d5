"""Beam search: keep the few likeliest beginnings, and go on with all of them at once.

Ends and comparisons follow transformers' search step by step, so that the texts are the same. Of the
continuations of all beams of a prompt the best few are candidates: those that end a text compete for
a place among the finished, by log-probability over length to a power; the best of the others are the
beams of the next step. The beams of a prompt share its keys and values, so when one beam takes the
place of another only what came after the prompt is copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optlens.generation.options import GenerationOptions
from optlens.generation.processing import Processing
from optlens.generation.rows import Rows
from optlens.generation.stopping import StopStrings

# What is added to the score of a candidate that must not win; far below any sum of logarithms, and
# finite, so that a search that has nothing better still returns something.
OUT = -1e9


class BeamSearch:
    """A beam search over a batch of prompts, one step at a time.

    Attributes:
        rows: The running beams, those of one prompt in a row.
        reasons: Why each returned text ended.
        scores: Processed log-probabilities of each step, `[row, d_vocab]`, if they are kept.
        logits: The model's logits of each step, likewise.
        sequences_scores: Of the returned texts, `[text]`; once finished.
    """

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
        self.n_prompts, self.n_beams = len(rows.tokens), options.num_beams
        # candidates enough that some go on, should each beam end in every way there is
        self.n_candidates = max(2, 1 + len(processing.eos)) * self.n_beams
        self.power = 1.0 if options.length_penalty is None else options.length_penalty
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.sequences_scores: Tensor | None = None
        self.reasons: list[str | None] = []
        device, shape = rows.tokens.device, (self.n_prompts, self.n_beams)
        # all beams begin alike, so at first only one may have continuations
        self.running = torch.full(shape, OUT, device=device)
        self.running[:, 0] = 0.0
        self.finished = torch.full(shape, OUT, device=device)
        self.is_finished = torch.zeros(shape, dtype=torch.bool, device=device)
        self.lengths = torch.zeros(shape, dtype=torch.long, device=device)
        self.texts = rows.tokens.unsqueeze(1).repeat(1, self.n_beams, 1)
        self.improvable = torch.ones(self.n_prompts, 1, dtype=torch.bool, device=device)
        self._eos = torch.tensor(processing.eos, dtype=torch.long, device=device)
        self.done = False

    def step(self) -> None:
        """Go on with all beams by one token."""
        log_probs = self._log_probs()
        best, beam, token = self._candidates(log_probs)
        rows, column = self.rows, self.rows.length
        texts = rows.tokens.view(self.n_prompts, self.n_beams, -1)
        texts = texts.take_along_dim(beam.unsqueeze(-1), 1)
        texts[:, :, column] = token
        ended = self._ended(texts, column)
        self._keep_finished(texts, best, ended)
        self._go_on(texts, best, beam, ended)
        self._see_whether_done(ended)

    def _log_probs(self) -> Tensor:
        """Return the processed log-probabilities of every beam's next token, `[row, d_vocab]`."""
        logits = self.rows.logits()
        if len(self.rows.tokens) == self.n_prompts:  # the prompts are run once
            self.rows.multiply(self.n_beams)
            logits = logits.repeat_interleave(self.n_beams, 0)
        log_probs = self.processing(logits.log_softmax(-1), self.rows)
        if self.options.output_logits:
            self.logits[self.rows.step :] = [logits]
        if self.options.output_scores:
            self.scores[self.rows.step :] = [log_probs]
        return log_probs

    def _candidates(self, log_probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores, beams and tokens of the best continuations, each `[prompt, candidate]`."""
        n_vocab = log_probs.shape[-1]
        total = log_probs.view(self.n_prompts, self.n_beams, n_vocab) + self.running.unsqueeze(-1)
        total = total.flatten(1)
        if self._generator is None:
            best, chosen = total.topk(self.n_candidates)
        else:
            shares = total.softmax(-1)
            chosen = torch.multinomial(shares, self.n_candidates, generator=self._generator)
            best = total.gather(1, chosen)
        return best, chosen // n_vocab, chosen % n_vocab

    def _ended(self, texts: Tensor, column: int) -> Tensor:
        """Say which candidates end a text with their newest token, `[prompt, candidate]`."""
        newest = texts[:, :, column]
        if column + 1 == self.rows.capacity:
            return torch.ones_like(newest, dtype=torch.bool)
        ended = torch.isin(newest, self._eos)
        if self._stop_strings is not None:
            first = self.rows.first[:: self.n_beams].repeat_interleave(self.n_candidates)
            written = texts[:, :, : column + 1].flatten(0, 1)
            found = self._stop_strings.completed(written, first)
            ended |= torch.tensor(found, device=ended.device).view_as(ended)
        return ended

    def _keep_finished(self, texts: Tensor, best: Tensor, ended: Tensor) -> None:
        """Let candidates that ended, among the best as many as beams, compete with the finished."""
        in_time = ended.clone()
        in_time[:, self.n_beams :] = False
        scores = best / (self.rows.step + 1) ** self.power
        if self.options.early_stopping is True:
            scores = scores + self.is_finished.all(-1, keepdim=True) * OUT
        scores = scores + ~self.improvable * OUT
        scores = scores + ~in_time * OUT
        lengths = torch.full_like(in_time, self.rows.step + 1, dtype=torch.long)
        self._merge(texts, scores, in_time, lengths)

    def _merge(self, texts: Tensor, scores: Tensor, ended: Tensor, lengths: Tensor) -> None:
        merged = torch.cat([self.finished, scores], 1)
        self.finished, places = merged.topk(self.n_beams)
        self.is_finished = torch.cat([self.is_finished, ended], 1).gather(1, places)
        self.lengths = torch.cat([self.lengths, lengths], 1).gather(1, places)
        self.texts = torch.cat([self.texts, texts], 1).take_along_dim(places.unsqueeze(-1), 1)

    def _go_on(self, texts: Tensor, best: Tensor, beam: Tensor, ended: Tensor) -> None:
        """Make the best candidates that did not end the beams of the next step."""
        open_scores = best + ended * OUT
        places = open_scores.topk(self.n_beams).indices
        self.running = open_scores.gather(1, places)
        offsets = torch.arange(self.n_prompts, device=beam.device).unsqueeze(1) * self.n_beams
        rows = (beam.gather(1, places) + offsets).flatten()
        self.rows.tokens = texts.take_along_dim(places.unsqueeze(-1), 1).flatten(0, 1)
        self.rows.cache.select(rows, start=self.rows.prompt_length)
        self.rows.length += 1

    def _see_whether_done(self, ended: Tensor) -> None:
        """Stop when no beam can improve on the finished, as far as `early_stopping` asks."""
        rows, early = self.rows, self.options.early_stopping
        reachable = rows.step
        if early == "never" and self.power > 0:
            reachable = rows.capacity - rows.prompt_length
        hoped = self.running[:, :1] / reachable**self.power
        worst = self.finished.amin(-1, keepdim=True).where(self.is_finished, OUT)
        self.improvable = self.improvable & (hoped > worst).any(-1, keepdim=True)
        full = early is True and bool(self.is_finished.all())
        self.done = full or bool(ended.all()) or not bool(self.improvable.any())

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return tokens and mask, `[text, pos]`, of the best texts of each prompt.

        Of an interrupted search that has not finished enough of them, running beams fill the places.
        """
        rows, n = self.rows, self.options.num_return_sequences
        if not self.done and rows.step:
            running = rows.tokens.view(self.n_prompts, self.n_beams, -1)
            lengths = torch.full_like(self.lengths, rows.step)
            scores = self.running / rows.step**self.power
            self._merge(running, scores, torch.zeros_like(self.is_finished), lengths)
        self.sequences_scores = self.finished[:, :n].flatten()
        lengths = self.lengths[:, :n].flatten()
        width = rows.prompt_length + int(lengths.max())
        texts = self.texts[:, :n].flatten(0, 1)[:, :width]
        written = torch.arange(width, device=lengths.device) - rows.prompt_length
        prompts = rows.real[:: len(rows.real) // self.n_prompts, :width].repeat_interleave(n, 0)
        self.reasons = self._reasons(texts, lengths)
        return texts, prompts & (written < lengths.unsqueeze(1))

    def _reasons(self, texts: Tensor, lengths: Tensor) -> list[str | None]:
        """Say why each returned text ended; None for one cut off by the limit or an interrupt."""
        reasons = []
        eos, first = self.processing.eos, self.rows.first.tolist()
        per_text = self.options.num_return_sequences
        for number, (text, length) in enumerate(zip(texts.tolist(), lengths.tolist(), strict=True)):
            written = text[: self.rows.prompt_length + length]
            start = first[number // per_text * (len(first) // self.n_prompts)]
            if length and written[-1] in eos:
                reasons.append("eos")
            elif self._stop_strings and length and self._stop_strings.completed_by(written[start:]):
                reasons.append("stop_string")
            else:
                reasons.append(None)
        return reasons
