"""The next token before and after a change, at every recorded position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from optlens.recording import FINAL, NotRecordedError, Recording

if TYPE_CHECKING:
    from optlens.report.one_prompt import OnePrompt

_CHUNK_BYTES = 2**26


@dataclass(frozen=True, eq=False)
class Predictions:
    """Hold the likeliest next tokens of two runs.

    Attributes:
        ids: tokens, `[pos, k]`: those that either run holds for likely, by what the second says.
        before: their probabilities in the first run, `[pos, k]`.
        after: in the second run, `[pos, k]`.
        kl: KL(first || second), nats, `[pos]`.
    """

    ids: np.ndarray
    before: np.ndarray
    after: np.ndarray
    kl: np.ndarray


def predictions(
    original: Recording, recording: Recording, one: OnePrompt, top_k: int = 8
) -> Predictions | None:
    """Compare what two runs on one prompt predict; None where that was not recorded.

    A recording without its model still has the top of its logit lens, of which as much is told.

    Args:
        original: the first run.
        recording: the second; the same one if nothing was changed.
        one: the prompt.
        top_k: how many tokens to list.
    """
    if recording._model is None or FINAL not in recording._tensors:
        return _stored(recording, one, top_k)
    first, second = (_final(run, one) for run in (original, recording))
    found = []
    size = max(1, _CHUNK_BYTES // (4 * recording.metadata["config"]["vocab_size"]))
    for start in range(0, len(first), size):
        chunk = slice(start, start + size)
        found.append(_compared(original, recording, first[chunk], second[chunk], top_k))
    ids, before, after, kl = (torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True))
    return Predictions(ids.astype(np.int32), before, after, kl)


def _final(recording: Recording, one: OnePrompt) -> Tensor:
    final = recording._tensors[FINAL]
    return final[one._index or 0][torch.as_tensor(one.columns)]


def _compared(
    original: Recording, recording: Recording, first: Tensor, second: Tensor, top_k: int
) -> tuple[Tensor, ...]:
    now = recording._unembed(second).float().log_softmax(-1)
    was = now if original is recording else original._unembed(first).float().log_softmax(-1)
    likely = torch.maximum(now, was).topk(min(top_k, now.shape[-1])).indices
    order = now.gather(-1, likely).argsort(dim=-1, descending=True, stable=True)
    ids = likely.gather(-1, order)
    kl = (was.exp() * (was - now)).sum(-1).clamp(min=0)
    return ids, was.gather(-1, ids).exp(), now.gather(-1, ids).exp(), kl


def _stored(recording: Recording, one: OnePrompt, top_k: int) -> Predictions | None:
    try:
        lens = recording.logit_lens(min(top_k, 5))
    except NotRecordedError:
        return None
    n_layers = recording.metadata["config"]["num_hidden_layers"]
    if recording.layers[-1] != n_layers - 1:
        return None
    ids, probs = (
        one.pick(values)[-1][torch.as_tensor(one.columns)].cpu().numpy()
        for values in (lens.top_tokens, lens.top_probs)
    )
    return Predictions(ids.astype(np.int32), probs, probs, np.zeros(len(ids), np.float32))
