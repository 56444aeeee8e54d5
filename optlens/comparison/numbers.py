"""The numbers of a comparison: divergences of predictions, cosines of residual streams.

The vocabulary is gone through for a few positions at a time; a table of probabilities over layers, positions and
tokens is never made.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optlens.comparison.alignment import Column
from optlens.logit_math import kl_divergence, log_probs
from optlens.recording import FINAL, Recording

CHUNK_BYTES = 16_000_000  # of the logits of one chunk, [positions, d_vocab] in float32
NO_TOKEN = -1
_BY_ROW = ("lens_kl", "lens_js", "guesses_a", "guesses_b", "guess_probs_a", "guess_probs_b")


@dataclass(frozen=True)
class _Side:
    """One of the two runs.

    Attributes:
        recording: The run.
        stream: Its residual stream, a row for each row of the comparison, `[row, pos, d_model]`.
        final: Its last residual, `[pos, d_model]`.
        places: The position of each column, None where it has no token.
        top_k: How many of the likeliest tokens to keep.
    """

    recording: Recording
    stream: Tensor
    final: Tensor
    places: list[int | None]
    top_k: int

    def read(self, resid: Tensor, part: slice, aligned: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what a residual `[pos, d_model]` predicts at some columns.

        Args:
            resid: A row of `stream`, or `final`.
            part: Which columns.
            aligned: Which of these have a token on both sides, `[column]`.

        Returns:
            Log-probabilities at aligned columns, `[aligned, d_vocab]`; the likeliest tokens, -1
            where there are none, and their probabilities, each `[column, top_k]`.
        """
        places = self.places[part]
        here = torch.tensor([place is not None for place in places])
        tokens = torch.full((len(places), self.top_k), NO_TOKEN)
        probs = torch.full((len(places), self.top_k), torch.nan)
        rows = resid[[place for place in places if place is not None]]
        log = log_probs(self.recording._unembed(rows))
        if len(rows):
            top = log.topk(self.top_k)
            tokens[here], probs[here] = top.indices.cpu(), top.values.exp().float().cpu()
        return log[aligned[here].to(log.device)], tokens, probs


def numbers(
    first: Recording,
    second: Recording,
    pairs: list[tuple[int, int]],
    columns: list[Column],
    top_k: int,
) -> dict[str, Tensor | None]:
    """Compute everything that is compared, a few columns at a time."""
    sides = [
        _Side(
            recording,
            recording.residual[[pair[i] for pair in pairs]],
            recording._get(FINAL, "residual"),
            [column[i] for column in columns],
            top_k,
        )
        for i, recording in enumerate((first, second))
    ]
    aligned = torch.tensor([None not in column for column in columns])
    size = max(1, CHUNK_BYTES // (4 * first.metadata["config"]["vocab_size"]))
    cuts = [slice(start, start + size) for start in range(0, len(columns), size)]
    parts = [_chunk(*sides, cut, aligned[cut]) for cut in cuts]
    found = {}
    for name, one in parts[0].items():
        found[name] = torch.cat([part[name] for part in parts], 0 if one.ndim == 1 else 1)
    return found | {"cosine": _cosine(*sides, aligned)}


def _chunk(a: _Side, b: _Side, part: slice, aligned: Tensor) -> dict[str, Tensor]:
    """Compare the predictions at some columns, and those of every row."""

    def spread(values: Tensor) -> Tensor:
        table = torch.full((len(aligned),), torch.nan)
        table[aligned] = values.float().cpu()
        return table

    log_a, final_a, _ = a.read(a.final, part, aligned)
    log_b, final_b, _ = b.read(b.final, part, aligned)
    forward, reverse, js = _divergences(log_a, log_b)
    rows: dict[str, list[Tensor]] = {name: [] for name in _BY_ROW}
    for resid_a, resid_b in zip(a.stream, b.stream, strict=True):
        row_a, *best_a = a.read(resid_a, part, aligned)
        row_b, *best_b = b.read(resid_b, part, aligned)
        lens_kl, _, lens_js = map(spread, _divergences(row_a, row_b))
        found = (lens_kl, lens_js, best_a[0], best_b[0], best_a[1], best_b[1])
        for name, value in zip(_BY_ROW, found, strict=True):
            rows[name].append(value)
    return {
        "kl": spread(forward),
        "kl_reverse": spread(reverse),
        "js": spread(js),
        "final_a": final_a[:, 0].clone(),
        "final_b": final_b[:, 0].clone(),
        **{name: torch.stack(values) for name, values in rows.items()},
    }


def _divergences(log_a: Tensor, log_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return KL(a || b), KL(b || a) and the Jensen-Shannon divergence, each `[aligned]`."""
    log_b = log_b.to(log_a.device)
    middle = torch.logaddexp(log_a, log_b)  # twice the mixture; divergences take any logits
    forward, reverse = kl_divergence(log_a, log_b), kl_divergence(log_b, log_a)
    js = (kl_divergence(log_a, middle) + kl_divergence(log_b, middle)) / 2
    # the mixture of equals is rounded
    return forward, reverse, js.masked_fill((forward == 0) & (reverse == 0), 0.0)


def _cosine(a: _Side, b: _Side, aligned: Tensor) -> Tensor | None:
    """Return the cosine of two residual streams, `[row, column]`; None if they differ in width."""
    if a.stream.shape[-1] != b.stream.shape[-1]:
        return None
    pairs = [p for p in zip(a.places, b.places, strict=True) if None not in p]
    here, there = [list(places) for places in zip(*pairs, strict=True)] or [[], []]
    table = torch.full((len(a.stream), len(aligned)), torch.nan)
    for row, (resid_a, resid_b) in enumerate(zip(a.stream, b.stream, strict=True)):
        one = resid_a[here].to("cpu", torch.float64)
        other = resid_b[there].to("cpu", torch.float64)
        # of equal vectors exactly 1: the root of a square is exact
        lengths = ((one * one).sum(-1) * (other * other).sum(-1)).sqrt()
        table[row, aligned] = ((one * other).sum(-1) / lengths).float()
    return table
