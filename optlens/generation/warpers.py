"""What is done to logits before a token is chosen: pure functions, `[batch, d_vocab]` to the same.

What must not be chosen becomes -inf. In sets of tokens and in probabilities each equals the class of
transformers' `logits_process.py` of the same purpose; the papers stand with the functions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FORBIDDEN = -torch.inf


def penalize_repetition(logits: Tensor, tokens: Tensor, real: Tensor, penalty: float) -> Tensor:
    """Make tokens that occurred before less likely (Keskar et al. 2019, arXiv 1909.05858).

    Args:
        logits: `[batch, d_vocab]`.
        tokens: The text so far, `[batch, pos]`.
        real: True where a token is no padding, `[batch, pos]`.
        penalty: Above 1 against repetition; below 1 for it.
    """
    seen = _marked(logits, tokens, real)
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def forbid_repeated_ngrams(logits: Tensor, tokens: Tensor, real: Tensor, size: int) -> Tensor:
    """Forbid tokens that would complete a run of `size` tokens a second time.

    Paulus et al. 2017, arXiv 1705.04304, for size 3.
    """
    if tokens.shape[1] < size:
        return logits
    runs, whole = tokens.unfold(1, size, 1), real.unfold(1, size, 1).all(-1)  # [batch, start, size]
    begun = tokens[:, tokens.shape[1] - size + 1 :]
    repeats = (runs[:, :, :-1] == begun.unsqueeze(1)).all(-1) & whole
    return logits.masked_fill(_marked(logits, runs[:, :, -1], repeats), FORBIDDEN)


def forbid_sequences(logits: Tensor, tokens: Tensor, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Forbid the last token of each sequence where the text ends in all that come before it."""
    logits = logits.clone()
    for *begun, last in sequences:
        if len(begun) > tokens.shape[1]:
            continue
        tail = tokens[:, tokens.shape[1] - len(begun) :]
        ends_so = (tail == torch.tensor(begun, dtype=torch.long, device=tail.device)).all(-1)
        logits[ends_so, last] = FORBIDDEN
    return logits


def forbid_tokens(logits: Tensor, ids: Sequence[int], rows: Tensor) -> Tensor:
    """Forbid some tokens in some rows, `[batch]` of bool."""
    logits = logits.clone()
    for token in ids:
        logits[:, token].masked_fill_(rows, FORBIDDEN)
    return logits


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k likeliest, and any as likely as the last of them (Fan et al. 2018, 1805.04833)."""
    least = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < least, FORBIDDEN)


def keep_top_p(logits: Tensor, p: float, at_least: int = 1) -> Tensor:
    """Keep the fewest likeliest whose probabilities sum to p (Holtzman et al. 2020, 1904.09751)."""
    ascending, order = logits.sort()
    tail = ascending.softmax(-1).cumsum(-1) <= 1 - p  # together, these are not needed
    tail[:, -at_least:] = False
    return logits.masked_fill(tail.scatter(1, order, tail), FORBIDDEN)


def keep_min_p(logits: Tensor, p: float, at_least: int = 1) -> Tensor:
    """Keep what has at least p times the highest probability (Nguyen et al. 2024, 2407.01082)."""
    shares = logits.softmax(-1)
    unlikely = shares < p * shares.amax(-1, keepdim=True)
    best = shares.topk(min(at_least, shares.shape[-1])).indices
    return logits.masked_fill(unlikely.scatter(1, best, False), FORBIDDEN)


def keep_typical(logits: Tensor, mass: float, at_least: int = 1) -> Tensor:
    """Keep tokens about as surprising as is to be expected (Meister et al. 2023, 2202.00666).

    They are ordered by how far their surprise is from the entropy, and kept until their
    probabilities sum to `mass`.
    """
    log_shares = logits.log_softmax(-1)
    entropy = -(log_shares * log_shares.exp()).nansum(-1, keepdim=True)  # 0 times -inf counts as 0
    distance, order = (-log_shares - entropy).abs().sort()
    reached = logits.gather(1, order).softmax(-1).cumsum(-1) < mass
    last = reached.sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    far = distance > distance.gather(1, last)
    far[:, :at_least] = False
    return logits.masked_fill(far.scatter(1, order, far), FORBIDDEN)


def _marked(logits: Tensor, ids: Tensor, where: Tensor) -> Tensor:
    """Mark the tokens among `ids [batch, n]` at which `where` is True, `[batch, d_vocab]`."""
    n_vocab = logits.shape[-1]
    marks = logits.new_zeros(len(logits), n_vocab + 1, dtype=torch.bool)  # one for nowhere
    return marks.scatter_(1, ids.masked_fill(~where, n_vocab), True)[:, :n_vocab]
